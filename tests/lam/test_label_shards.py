"""`lara label` by several processes, and in shards that are merged: the bytes are those of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("tyro")

from helpers import disk_datasets as disk
from test_label import ENVIRONMENT, GAP, killed, lam, tree  # noqa: F401  (a fixture)

from lara_adapter import LaraArgumentError, cli
from lara_adapter.data.dataset import EpisodeLike
from lara_adapter.lam.label import label_dataset
from lara_adapter.lam.label.shards import as_arguments, share

LENGTHS = (14, 9, 20, 6, 11)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Five episodes; that the frames of the fourth end too early is seen only while decoding."""
    root = disk.make_v2(tmp_path_factory.mktemp("source") / "squares", lengths=LENGTHS)
    spoil(root, 3)
    return root


def spoil(root, number):
    """A video whose pictures are torn; its header says nothing of it."""
    path = next(root.rglob(f"episode_{number:06d}.mp4"))
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat")
    stop = begin - 4 + int.from_bytes(content[begin - 4 : begin], "big")  # the size of the box
    content[begin + 4 : stop] = b"\xff" * (stop - begin - 4)
    path.write_bytes(content)


def arguments(source, lam, output, *more):  # noqa: F811
    return ["label", source, "--lam", lam, "--output", output, "--gap", GAP, "--no-link", *more]


def run(*command):
    return cli.main([str(part) for part in command])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, lam, source):  # noqa: F811
    """What one process writes: folder -> output."""
    base = tmp_path_factory.mktemp("alone")
    report = label_dataset(source, lam, base / "copy" / "out", gap=GAP, link=False)
    assert list(report.left_out) == ["3"]
    label_dataset(source, lam, base / "sidecar" / "out.parquet", gap=GAP, sidecar=True)
    return base


@pytest.mark.parametrize("sidecar", [False, True])
def test_shards_merge_to_the_bytes_of_one_process(tmp_path, lam, source, alone, sidecar):  # noqa: F811
    output = tmp_path / ("out.parquet" if sidecar else "out")
    command = arguments(source, lam, output, *(["--sidecar"] if sidecar else []))
    for index in (2, 0, 1):
        assert run(*command, "--shard", f"{index}/3") == 0
        assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{output.name}.shard-{i}-of-3" for i in range(3)]
    assert run(*command, "--merge") == 0
    assert tree(tmp_path) == tree(alone / ("sidecar" if sidecar else "copy"))  # the shards are gone
    assert run(*command, "--shard", "1/3") == 0  # of a queue that runs it again
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_killed_shards_and_merges_go_on(tmp_path, lam, source, alone):  # noqa: F811
    output = tmp_path / "out"
    command = arguments(source, lam, output)
    first = [*command, "--shard", "0/2"]
    killed("lara_adapter.lam.label.work:write_tensors", 1, *first)
    killed("lara_adapter.lam.label.job:write_complete", 0, *first)
    assert len(list((tmp_path / "out.shard-0-of-2/episodes").iterdir())) == 2
    killed("lara_adapter.lam.label.work:write_tensors", 0, *command, "--shard", "1/2")
    with pytest.raises(
        LaraArgumentError, match=r"merge: .* 0/2 is unfinished, 1/2 is unfinished; run the same command"
    ):
        label_dataset(source, lam, output, gap=GAP, link=False, merge=True)
    assert run(*first) == run(*command, "--shard", "1/2") == 0
    killed("lara_adapter.lam.label.copy:_link_or_copy", 3, *command, "--merge")
    killed("shutil:rmtree", 1, *command, "--merge")  # the output is there, and a shard as well
    assert output.is_dir()
    assert (tmp_path / "out.shard-0-of-2").is_dir()
    assert run(*command, "--merge") == 0
    assert tree(tmp_path) == tree(alone / "copy")


def test_a_missing_shard_and_missing_episodes_are_named(tmp_path, lam, source):  # noqa: F811
    def merged(message, **changes):
        with pytest.raises(LaraArgumentError, match=message):
            label_dataset(source, lam, tmp_path / "out", **{"gap": GAP, "merge": True, **changes})

    merged(r"merge: there is no .*out.shard-0-of-1 or the like; label with --shard first")
    for index in (0, 1):
        label_dataset(source, lam, tmp_path / "out", gap=GAP, shard=f"{index}/3")
    merged(
        r"merge: of the shards of .*out, 2/3 is missing; run .* with --shard for each, or copy .*out.shard-I-of-3 here"
    )
    merged(r"merge: .*shard-0-of-3 was made with other settings: gap_frames 4 \(now 5\)", gap=GAP + 1)
    label_dataset(source, lam, tmp_path / "out", gap=GAP, shard="2/3", episodes=["4"])
    # of the one selected episode the middle is in the second third
    merged(r"the shards of .* are complete, but do not have the episodes 3, 4, 4|do not have the episodes 4|3:5")
    label_dataset(source, lam, tmp_path / "out", gap=GAP, shard="2/3")
    label_dataset(source, lam, tmp_path / "out", gap=GAP, shard="0/2")
    merged(r"shards of 2 and of 3 lie beside .*; delete the folders")
    shutil.rmtree(tmp_path / "out.shard-0-of-2")
    (tmp_path / "out.shard-1-of-3/complete.json").write_text("{}")
    merged(r"shard-1-of-3 is damaged: 'left_out'; delete it, and label it again")


def test_a_shard_without_episodes_or_with_damaged_ones_alone_is_done(tmp_path, lam, caplog):  # noqa: F811
    root = disk.make_v2(tmp_path / "squares", lengths=(9, 9))
    next(root.rglob("episode_000001.mp4")).unlink()
    reports = [label_dataset(root, lam, tmp_path / "out", gap=GAP, shard=f"{index}/4") for index in range(4)]
    assert [report.episodes for report in reports] == [0, 1, 0, 0]
    assert "shard 3/4: every episode of it is damaged: " in caplog.text
    assert list(reports[3].left_out) == ["1"]
    report = label_dataset(root, lam, tmp_path / "out", gap=GAP, merge=True)
    assert (report.episodes, list(report.left_out)) == (1, ["1"])


def launch(*command):
    """Two processes of accelerate."""
    # --cpu would start one; without GPUs this is gloo
    options = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--main_process_port", 0]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    start = [sys.executable, "-m", "accelerate.commands.launch", *options, *command]
    return subprocess.run(list(map(str, start)), capture_output=True, text=True, env=ENVIRONMENT, timeout=200)


@pytest.mark.parametrize("kill", [False, pytest.param(True, marks=pytest.mark.long)])
def test_accelerate_processes_share_the_episodes(tmp_path, lam, source, alone, kill):  # noqa: F811
    pytest.importorskip("accelerate")
    command = [*arguments(source, lam, tmp_path / "out"), "--device", "cpu", "--json"]
    if kill:  # one episode each, of a run of one process before
        killed("lara_adapter.lam.label.work:write_tensors", 1, *command)
    done = launch("-m", "lara_adapter.cli", *command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["episodes"], report["resumed"], list(report["left_out"])) == (4, int(kill), ["3"])
    assert tree(tmp_path) == tree(alone / "copy")


@pytest.mark.slow
def test_an_error_of_one_accelerate_process_ends_all(tmp_path, lam, source):  # noqa: F811
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from lara_adapter.lam.label import work, label_dataset\n"
        "def fail(*arguments): raise OSError(28, 'no space left')\n"
        "if os.environ['RANK'] == '1': work.write_tensors = fail\n"
        "try: label_dataset(*sys.argv[1:4], gap=4, device='cpu')\n"
        "except Exception as error: open(sys.argv[3] + os.environ['RANK'], 'w').write(repr(error))\n"
    )
    done = launch(script, source, lam, tmp_path / "out")
    assert "process 1: OSError: [Errno 28] no space left" in (tmp_path / "out0").read_text(), done.stderr
    assert "no space left" in (tmp_path / "out1").read_text()
    assert len(list((tmp_path / ".out.labelling/episodes").iterdir())) > 0  # what was done is kept


@pytest.mark.parametrize("text", ["4/4", "a/b", "-1/4"])
def test_shards_that_do_not_exist(tmp_path, lam, source, text):  # noqa: F811
    with pytest.raises(LaraArgumentError, match=f"shard='{text}', but \"i/n\""):
        label_dataset(source, lam, tmp_path / "out", gap=GAP, shard=text)
    with pytest.raises(LaraArgumentError, match="a shard is labelled by one call, and merged by another"):
        label_dataset(source, lam, tmp_path / "out", gap=GAP, shard="0/1", merge=True)


def test_shares_are_consecutive_and_near_in_frames():
    episodes = [EpisodeLike(number, 1 + number * 7 % 13, "") for number in range(50)]
    total = sum(episode.length for episode in episodes)
    for count in (1, 2, 3, 7, 60):
        shares = [share(episodes, index, count) for index in range(count)]
        assert [episode for part in shares for episode in part] == episodes
        assert all(abs(sum(e.length for e in part) - total / count) <= 13 for part in shares)
    assert share([], 0, 2) == []


def test_ranges_are_what_episodes_takes():
    assert as_arguments([7, 0, 1, 2, 9]) == ["0:3", "7", "9"]
    assert as_arguments([]) == []
