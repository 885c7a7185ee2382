"""`lara train-lam`: videos that are indexed while it trains, shares of an index, some of the episodes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest

pytest.importorskip("av")
pytest.importorskip("accelerate")
pytest.importorskip("tqdm")

from helpers.interrupted import interrupted
from helpers.videos import numbered, square, write_v21, write_video
from test_pretrain import ENVIRONMENT, SMALL, TWO, command, same, settings_of

import lara_adapter.data.ahead as ahead_module
import lara_adapter.data.scan_cache as scan_cache
import lara_adapter.lam.pretrain.videos as videos_module
from lara_adapter import LaraArgumentError, cli
from lara_adapter.data import Source
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
from lara_adapter.lam.pretrain.videos import index_mode, scan_videos


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(12):
        write_video(folder / f"{number}.mp4", square(60, number))
    return folder


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def short(monkeypatch):
    """Stretches of two videos, then of four."""
    monkeypatch.setattr(ahead_module, "_FIRST", 200)
    monkeypatch.setattr(ahead_module, "_LONGEST", 400)


@pytest.fixture
def scanned(monkeypatch):
    """Names of the files that are decoded to be indexed."""
    names = []
    real = scan_cache.scan_source
    monkeypatch.setattr(scan_cache, "scan_source", lambda s, gap: (names.append(s.path.name), real(s, gap))[1])
    return names


def test_a_run_that_indexes_ahead_resumes_with_the_same_bits(videos, small, tmp_path, short, caplog):
    whole = settings_of(videos, tmp_path / "whole", small, index="ahead", steps=60, save_every=20, held_out=0.2)
    pretrain_lam(whole)
    report = json.loads((tmp_path / "whole" / "videos.json").read_text())
    assert report["index"] == "ahead"
    assert report["sources"] == 12
    assert 9 <= report["scanned"] == report["usable"] <= 12  # of those that are held out only as many as are needed
    assert report["held_out_pairs"] > 0
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    interrupted(broken, 33)
    with caplog.at_level(logging.INFO):
        pretrain_lam(broken)
    assert "resumed from" in caplog.text
    assert same(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(LaraArgumentError, match="index was 'ahead' and is 'whole'"):
        pretrain_lam(dataclasses.replace(broken, index="auto"))


@pytest.mark.long
def test_two_processes_index_ahead_without_each_other(videos, small, tmp_path):
    code = TWO.replace('preset="tiny",', 'preset="tiny", index="ahead", held_out=0.2,')
    code = "import lara_adapter.data.ahead as a\na._FIRST, a._LONGEST = 100, 200\n" + code
    (tmp_path / "two.py").write_text(code)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    arguments = [str(videos), str(tmp_path / "run"), str(small), "90"]
    done = subprocess.run(
        [sys.executable, *run, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = []
    for rank in range(2):
        (journal,) = (tmp_path / "run" / "index").glob(f"ahead-*-{rank}-of-2.jsonl")
        stretches = [json.loads(line) for line in journal.read_text().splitlines()]
        pairs = sum(stretch["pairs"] for stretch in stretches if stretch["epoch"] == 0)
        seen = json.loads((tmp_path / "run" / f"seen-{rank}.json").read_text())
        shares.append({tuple(pair[1:]) for pair in seen[:pairs]})
        assert len(shares[-1]) == pairs
    assert not shares[0] & shares[1]
    report = json.loads((tmp_path / "run" / "videos.json").read_text())
    assert len(shares[0] | shares[1]) == report["pairs"]
    assert report["sources"] == 12
    assert report["scanned"] >= 10  # all that are trained on, and what is measured on


def test_shares_of_an_index_need_each_other_for_nothing(videos, small, tmp_path, scanned, capsys):
    pytest.importorskip("tyro")
    arguments = command(videos, tmp_path / "run", small)[3:]
    for number, count in ((2, 4), (0, 4), (1, 4)):
        scanned.clear()
        assert cli.main([*arguments, "--index-only", "--shard", f"{number}/{count}"]) == 0
        assert len(scanned) == 3
        text = f"{tmp_path / 'run' / 'index'}: 3 sources, 180 frames decoded, 0 cannot be read"
        assert capsys.readouterr().out.strip() == text
    assert not (tmp_path / "run" / "videos.json").exists()
    scanned.clear()
    pretrain_lam(settings_of(videos, tmp_path / "run", small, steps=1))
    assert len(scanned) == 3  # of the share that is missing
    scanned.clear()
    assert scan_videos(settings_of(videos, tmp_path / "run", small)).frames == 0
    assert not scanned


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--shard", "0/4"], "is for --index-only"), (["--index-only", "--shard", "4/4"], "0 <= i < n")],
)
def test_shares_that_make_no_sense_are_refused(videos, small, tmp_path, capsys, more, message):
    pytest.importorskip("tyro")
    assert cli.main([*command(videos, tmp_path / "run", small)[3:], *more]) == 2
    assert message in capsys.readouterr().err


def test_episodes_and_skip(tmp_path, small):
    write_v21(tmp_path / "set", [30, 31, 32, 33], fps=30)
    settings = settings_of(
        tmp_path / "set", tmp_path / "run", small, steps=1, episodes=("1:",), skip=("2",), cut_threshold=0.0,
        still_threshold=0.0, held_out=0.0,
    )  # fmt: skip
    pretrain_lam(settings)
    report = json.loads((tmp_path / "run" / "videos.json").read_text())
    assert (report["sources"], report["frames"], report["pairs"]) == (2, 64, 54)
    with pytest.raises(LaraArgumentError, match="skip was"):
        pretrain_lam(dataclasses.replace(settings, skip=()))
    write_v21(tmp_path / "other", [30], fps=30)
    with pytest.raises(LaraArgumentError, match="one dataset"):
        pretrain_lam(dataclasses.replace(settings, videos=(tmp_path / "set", tmp_path / "other")))


def test_what_is_indexed_ahead(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(5))
    settings = PretrainSettings(videos=(tmp_path,), output=tmp_path)
    source = Source(path)
    assert index_mode(settings, [source] * 10_000) == "whole"
    assert index_mode(settings, [source] * 10_001) == "ahead"
    assert index_mode(dataclasses.replace(settings, index="whole"), [source] * 10_001) == "whole"
    monkeypatch.setattr(videos_module, "_WHOLE_BYTES", path.stat().st_size)
    assert index_mode(settings, [source, Source(tmp_path / "gone.mp4")]) == "whole"
    monkeypatch.setattr(videos_module, "_WHOLE_BYTES", path.stat().st_size - 1)
    assert index_mode(settings, [source]) == "ahead"
    with pytest.raises(LaraArgumentError, match="index='all', but auto or whole or ahead"):
        dataclasses.replace(settings, index="all")


@pytest.mark.parametrize("index", ["whole", "ahead"])
def test_names_that_are_no_text(videos, small, tmp_path, index, caplog):
    folder = tmp_path / "odd"
    folder.mkdir()
    try:
        for number, name in enumerate((b"caf\xe9.mp4", b"two\nlines.mp4", b"plain.mp4", b"100%?.mp4")):
            (folder / os.fsdecode(name)).symlink_to(videos / f"{number}.mp4")
        (folder / os.fsdecode(b"torn\xff.mp4")).write_bytes(b"no video")
    except OSError:
        pytest.skip("the file system has no such names")
    pretrain_lam(settings_of(folder, tmp_path / "run", small, index=index, held_out=0.3))
    report = json.loads((tmp_path / "run" / "videos.json").read_text())
    (fault,) = report["faults"]
    assert fault["file"].endswith("torn\\xff.mp4")
    assert "torn\\xff.mp4" in caplog.text
    assert report["usable"] == 4
