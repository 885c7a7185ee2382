"""The index: faults are reported, what was seen is not looked at again, episodes are held out."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("av")

from helpers.videos import numbered, square, write_audio, write_video

import lara_adapter.data.scan_cache as scan_cache
from lara_adapter import LaraArgumentError
from lara_adapter.data import IndexSettings, build_index, find_sources, require_pairs
from lara_adapter.data.gap import Gap
from lara_adapter.data.index import Scanned, scan_sources


@pytest.fixture
def scanned(monkeypatch):
    """Names of the files that are decoded to be indexed."""
    names = []
    real = scan_cache.scan_source
    monkeypatch.setattr(scan_cache, "scan_source", lambda s, gap: (names.append(s.path.name), real(s, gap))[1])
    return names


def test_damaged_files_are_left_out_and_reported(tmp_path, caplog):
    folder = tmp_path / "videos"
    write_video(folder / "good.mp4", numbered(20))
    write_audio(folder / "song.mp4")
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "text.webm").write_text("no video")
    write_video(folder / "short.avi", numbered(4))
    cut_off = write_video(folder / "unfinished.mp4", numbered(30)).read_bytes()
    (folder / "unfinished.mp4").write_bytes(cut_off[: len(cut_off) // 2])  # the table at the end is missing
    found = build_index(find_sources([folder]), IndexSettings(held_out=0.0), tmp_path / "index")
    assert [clip.source.path.name for clip in found.sources] == ["good.mp4"]
    assert found.report["sources"] == 6
    assert found.report["usable"] == 1
    assert found.report["pairs"] == 15
    faults = {fault["file"].rpartition("/")[2]: fault["what"] for fault in found.report["faults"]}
    assert faults.keys() == {"song.mp4", "empty.mkv", "text.webm", "short.avi", "unfinished.mp4"}
    assert "no video" in faults["song.mp4"]
    assert "no pair of frames in 4 frames" in faults["short.avi"]
    assert "5 of 6 sources are damaged or give no pair" in caplog.text


def test_nothing_usable_is_one_clear_error(tmp_path, caplog):
    (tmp_path / "a.mp4").write_bytes(b"")
    for folder, message in ((tmp_path, r"among 1 sources .*a\.mp4"), (tmp_path / "none", "nothing was found")):
        folder.mkdir(exist_ok=True)
        with pytest.raises(LaraArgumentError, match=f"no usable video .*{message}"):
            require_pairs(build_index(find_sources([folder]), IndexSettings(), tmp_path / "index").report)
    assert not caplog.records  # and not a warning with the same list


def test_scanned_sources_are_not_scanned_again(tmp_path, scanned):
    folder = tmp_path / "videos"
    for name in "abc":
        write_video(folder / f"{name}.mp4", numbered(20))
    (folder / "d.mp4").write_bytes(b"")

    def build(**settings):
        scanned.clear()
        return build_index(find_sources([folder]), IndexSettings(**settings), tmp_path / "index")

    first = build()
    assert sorted(scanned) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    again = build()
    assert scanned == ["d.mp4"]  # that it cannot be opened may be the machine's fault
    assert again.report == first.report
    assert build(still_keep=1.0, cut_threshold=0.0).report["frames"] == 60  # thresholds apply to what was seen
    assert scanned == ["d.mp4"]
    write_video(folder / "b.mp4", numbered(31))
    assert build().report["frames"] == 71
    assert scanned == ["b.mp4", "d.mp4"]
    for path in (tmp_path / "index").iterdir():
        path.write_bytes(path.read_bytes()[:40])  # killed by a full disk
    build()
    assert len(scanned) == 4
    build(gap=Gap(7))
    assert len(scanned) == 4


def test_each_process_scans_its_share(tmp_path, scanned):
    for name in "abcde":
        write_video(tmp_path / "v" / f"{name}.mp4", numbered(12))
    sources = find_sources([tmp_path / "v"])
    shares = []

    for rank in range(2):
        assert list(scan_sources(sources[rank::2], Gap(5), tmp_path / "index")) == [Scanned(12)] * (3 - rank)
        shares.append(sorted(scanned))
        scanned.clear()
    assert shares == [["a.mp4", "c.mp4", "e.mp4"], ["b.mp4", "d.mp4"]]
    assert build_index(sources, IndexSettings(), tmp_path / "index").report["frames"] == 60
    assert scanned == []


def test_held_out_episodes_stay_when_videos_are_added_or_moved(tmp_path):
    for number in range(30):
        write_video(tmp_path / "v" / "x" / f"{number}.mp4", numbered(8))
    settings = IndexSettings(gap=Gap(2), held_out=0.2, still_threshold=0.0)

    def held():
        clips = build_index(find_sources([tmp_path / "v"]), settings, tmp_path / "index").sources
        assert not any(clip.train.any() and clip.held_out.any() for clip in clips)
        return {clip.source.path.name for clip in clips if clip.held_out.any()}

    before = held()
    assert 1 <= len(before) <= 14
    write_video(tmp_path / "v" / "x" / "new.mp4", numbered(8))
    assert held() - {"new.mp4"} == before
    (tmp_path / "v" / "x").rename(tmp_path / "y")
    (tmp_path / "v" / "deeper").mkdir()
    (tmp_path / "y").rename(tmp_path / "v" / "deeper" / "x")
    assert held() - {"new.mp4"} == before


@pytest.mark.parametrize("seed", range(6))  # seeds that would have drawn each of the useless ones
def test_a_source_without_a_pair_is_not_held_out(tmp_path, seed):
    for number in range(3):
        write_video(tmp_path / "v" / f"good{number}.mp4", square(40, number))
    for number in range(6):
        (tmp_path / "v" / f"broken{number}.mp4").write_bytes(b"\0" * 3000)
        write_video(tmp_path / "v" / f"short{number}.mp4", square(3, number))
    settings = IndexSettings(held_out=0.05, seed=seed)
    found = build_index(find_sources([tmp_path / "v"]), settings, tmp_path / "index")
    assert sum(clip.held_out.any() for clip in found.sources) == 1
    assert sum(clip.train.any() for clip in found.sources) == 2
    assert found.report["held_out_pairs"] > 20
    assert len(found.report["faults"]) == 12


def test_of_one_good_video_beside_broken_ones_the_end_is_held_out(tmp_path):
    write_video(tmp_path / "v" / "good.mp4", square(100))
    (tmp_path / "v" / "broken.mp4").write_bytes(b"\0" * 3000)
    found = build_index(find_sources([tmp_path / "v"]), IndexSettings(held_out=0.2), tmp_path / "index")
    assert found.report["held_out_pairs"] > 10
    assert found.report["pairs"] > 50


def test_a_video_that_is_too_short_to_be_divided_is_named(tmp_path):
    write_video(tmp_path / "v" / "short.mp4", square(6))
    report = build_index(find_sources([tmp_path / "v"]), IndexSettings(), tmp_path / "index").report
    assert report["faults"][0]["what"] == "no pair of frames in 6 frames"


def test_of_a_single_video_the_end_is_held_out(tmp_path):
    write_video(tmp_path / "a.mp4", square(100))
    (clip,) = build_index(find_sources([tmp_path]), IndexSettings(held_out=0.1), tmp_path / "index").sources
    assert np.flatnonzero(clip.train).max() == 84  # whose future is the last frame before the border
    assert np.flatnonzero(clip.held_out).tolist() == list(range(90, 95))


def test_what_is_turned_is_counted(tmp_path, monkeypatch):
    real = scan_cache.scan_source
    monkeypatch.setattr(
        scan_cache, "scan_source", lambda s, gap: real(s, gap)._replace(turned="upside down" * (s.path.stem != "a"))
    )
    for name in "abc":
        write_video(tmp_path / "v" / f"{name}.mp4", numbered(12))
    for _ in range(2):
        report = build_index(find_sources([tmp_path / "v"]), IndexSettings(), tmp_path / "index").report
        assert report["turned"] == {"upside down": 2}
