"""Files may be named as the file system allows; what cannot be opened today may be opened tomorrow."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from helpers.videos import png, square, write_video

from lara_adapter.data import IndexSettings, build_index, find_sources, open_dataset
from lara_adapter.data.decode import read_frames
from lara_adapter.data.sources import natural_key, shown

NAMES = [
    b"2024-05-01T12:30:00", b"a%03d", b"b#1", b"c?x", b"a|b", b"concat:x", b"pipe:0", b"http:x", b"file:y", b"-i",
    b" space ", b"new\nline", b"tab\t", b"quote'\"", b"back\\slash", b"\xb2\xe2\xca\xd4", "①".encode(),
    "10²".encode(), "٣".encode(), "wärme 動画".encode(), b"*[a-z]{1,2}", b"$HOME", b"~", b"name" * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "walk.mp4", square(20), "libx264")


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(os.fsdecode(name))[1:20])
def test_a_video_of_any_name_is_read_by_every_reader(tmp_path, video, name, relative, monkeypatch, caplog):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    path = folder / os.fsdecode(name + b".mp4")
    shutil.copy(video, path)
    monkeypatch.chdir(folder)
    where = Path(path.name) if relative else path
    for start in (where, Path() if relative else folder):
        index = build_index(find_sources([start]), IndexSettings(held_out=0.0), tmp_path / "index")
        assert (index.report["usable"], index.report["frames"], index.report["faults"]) == (1, 20, [])
        json.dumps(index.report).encode()
        (found,) = index.sources
        assert read_frames(found.source, found.pts, found.keys, np.array([3]), 32).shape == (1, 32, 32, 3)
        dataset = open_dataset(start)
        assert [episode.length for episode in dataset.episodes] == [20]
        assert list(dataset.pick("", dataset.episodes[0], [7])) == [7]
        f"{dataset.name} {dataset.episodes[0].name}".encode()
        assert "\n" not in dataset.episodes[0].name
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(os.fsdecode(name))[1:20])
def test_a_folder_of_pictures_of_any_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    for number, frame in enumerate(square(12)):
        (folder / os.fsdecode(name[:100] + b"_%d.png" % number)).write_bytes(png(frame))
    index = build_index(find_sources([tmp_path]), IndexSettings(held_out=0.0), tmp_path / "index")
    assert (index.report["usable"], index.report["frames"], index.report["faults"]) == (1, 12, [])
    dataset = open_dataset(folder)
    assert len(dataset.pick("", dataset.episodes[0], range(12))) == 12


def test_one_damaged_name_does_not_hide_the_others(tmp_path, video, caplog):
    for name in (b"a.mp4", b"\xff\xfe.mp4", b"new\nline.mp4"):
        shutil.copy(video, tmp_path / os.fsdecode(name))
    (tmp_path / os.fsdecode(b"\xb2broken\n.mp4")).write_bytes(b"nothing")
    os.symlink("/nowhere.mp4", tmp_path / "dangling.mp4")
    with caplog.at_level(logging.WARNING):
        index = build_index(find_sources([tmp_path]), IndexSettings(held_out=0.0), tmp_path / "index")
    assert (index.report["usable"], index.report["sources"]) == (3, 5)
    names = " ".join(fault["file"] for fault in index.report["faults"])
    assert r"\xb2broken\n.mp4" in names
    assert "dangling.mp4" in names
    json.dumps(index.report).encode()
    caplog.text.encode()
    assert [episode.length for episode in open_dataset(tmp_path).episodes] == [20, 20, 20]


def test_a_failure_to_open_is_not_remembered(tmp_path, video, monkeypatch):
    path = tmp_path / "v" / "a.mp4"
    path.parent.mkdir()
    shutil.copy(video, path)
    from lara_adapter.data import video as module

    av = module.require_av()
    with monkeypatch.context() as patch:
        patch.setattr(
            av, "open", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        report = build_index(find_sources([path]), IndexSettings(held_out=0.0), tmp_path / "index").report
        assert report["usable"] == 0
        assert "Permission denied" in report["faults"][0]["what"]
    report = build_index(find_sources([path]), IndexSettings(held_out=0.0), tmp_path / "index").report
    assert (report["usable"], report["faults"]) == (1, [])


def test_names_are_sorted_as_people_count():
    names = ["f10", "f2", "f²", "f①", "f1", "F3", "٣", "10", "9"]
    assert sorted(names, key=natural_key) == ["f1", "f2", "F3", "f10", "f²", "f①", "٣", "9", "10"]


def test_names_are_shown_as_one_line_of_text():
    assert shown(os.fsdecode(b"a\n\xb2\x1b[31m/w\xc3\xa4rme \xe2\x80\xae.mp4")) == r"a\n\xb2\x1b[31m/wärme \u202e.mp4"
