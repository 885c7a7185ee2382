"""What counts as a pair: the gap, cuts, still stretches."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("av")

from helpers.videos import numbered, square, still, write_video

from lara_adapter import LaraArgumentError
from lara_adapter.data import IndexSettings, Source, build_index
from lara_adapter.data.gap import Gap
from lara_adapter.data.scan import find_cuts, scan_source, thin_out


def index_of(path, tmp_path, **settings):
    return build_index([Source(path)], IndexSettings(held_out=0.0, **settings), tmp_path / "index")


def pairs_of(clip):
    return {int(t): int(clip.future[t]) for t in np.flatnonzero(clip.train)}


def test_a_gap_in_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(30))
    (clip,) = index_of(path, tmp_path, gap=Gap(7)).sources
    assert pairs_of(clip) == {t: t + 7 for t in range(23)}


@pytest.mark.parametrize(("fps", "seconds", "frames"), [(30, 0.5, 15), (10, 0.5, 5), (30, 0.16, 5), (25, 1.0, 25)])
def test_a_gap_in_seconds_is_the_nearest_frame(tmp_path, fps, seconds, frames):
    path = write_video(tmp_path / "a.mkv", numbered(40), fps=fps)
    (clip,) = index_of(path, tmp_path, gap=Gap(None, seconds)).sources
    assert pairs_of(clip) == {t: t + frames for t in range(40 - frames)}


def test_a_gap_in_seconds_at_a_variable_rate(tmp_path):
    # 20 frames a second, then 5.6, then a hole of 2 seconds
    times = [*np.arange(20) * 0.05, *(1 + np.arange(10) * 0.18), *(5 + np.arange(10) * 0.05)]
    path = write_video(tmp_path / "a.mkv", numbered(40), "mpeg4", times=times)
    (clip,) = index_of(path, tmp_path, gap=Gap(None, 0.4)).sources
    pairs = pairs_of(clip)
    assert pairs[0] == 8
    assert pairs[20] == 22
    assert pairs[30] == 38
    assert all(abs(times[b] - times[a] - 0.4) <= 0.1 + 1e-9 for a, b in pairs.items())
    assert not {28, 29} & pairs.keys()  # nothing 0.4 seconds later
    assert len(pairs) == 20 + 8 + 2


def test_no_pair_over_a_cut(tmp_path):
    frames = [*square(20), *(255 - f for f in square(20, seed=1)), *square(15, seed=2)]
    path = write_video(tmp_path / "a.mp4", frames, "libx264")
    found = index_of(path, tmp_path)
    assert found.report["cuts"] == 2
    (clip,) = found.sources
    assert pairs_of(clip) == {t: t + 5 for t in [*range(15), *range(20, 35), *range(40, 50)]}
    all_of_them = index_of(path, tmp_path, cut_threshold=0.0)
    assert all_of_them.report["pairs"] == 50


def test_a_fast_camera_is_not_a_cut():
    moving = np.full(30, 0.15, np.float32)
    moving[0] = 0
    assert not find_cuts(moving, 0.08).any()
    moving[10] = 0.6
    assert np.flatnonzero(find_cuts(moving, 0.08)).tolist() == [10]
    alone = np.zeros(5, np.float32)
    alone[[1, 4]] = 0.3  # at both ends
    assert np.flatnonzero(find_cuts(alone, 0.08)).tolist() == [1, 4]


def test_still_stretches_are_thinned_evenly_and_reported(tmp_path):
    frames = [*square(20), *([list(square(20))[-1]] * 60), *square(20, seed=0)]
    path = write_video(tmp_path / "a.mp4", frames, "libx264")
    found = index_of(path, tmp_path, still_keep=0.1, cut_threshold=0.0)
    assert 50 <= found.report["still_pairs"] <= 60
    assert found.report["still_pairs_left_out"] == found.report["still_pairs"] - found.report["still_pairs"] // 10
    kept = np.flatnonzero(found.sources[0].train)
    kept = kept[(kept >= 20) & (kept < 74)]
    assert 4 <= len(kept) <= 6
    assert np.diff(kept).max() <= 12
    assert index_of(path, tmp_path, still_keep=1.0, cut_threshold=0.0).report["pairs"] == 95
    assert index_of(path, tmp_path, still_keep=0.0, cut_threshold=0.0).report["pairs"] <= 45


def test_thinning_keeps_the_share():
    kept = thin_out(np.arange(1000) % 4 > 0, 0.3)
    assert kept[np.arange(1000) % 4 == 0].all()
    assert kept.sum() == 250 + 225


def test_a_video_in_which_nothing_moves(tmp_path):
    path = write_video(tmp_path / "a.mp4", still(30))
    found = index_of(path, tmp_path, still_keep=0.0)
    assert found.report["pairs"] == 0
    assert found.report["faults"] == [{"file": str(path), "what": "no pair of frames in 30 frames", "used": "no"}]


def test_a_small_thing_that_moves_is_not_still(tmp_path):
    """A gripper of 1 % of the picture."""
    frames = list(still(40))
    for number, frame in enumerate(frames):
        frame[30:36, number : number + 6] = 255
    scan = scan_source(Source(write_video(tmp_path / "a.mp4", frames, "libx264")), Gap(5))
    assert scan.motion[:35].min() > 0.02


@pytest.mark.parametrize("gap", [Gap(None, None), Gap(5, 1.0), Gap(0), Gap(None, -1.0)])
def test_an_invalid_gap_is_refused(gap):
    with pytest.raises(LaraArgumentError, match="gap="):
        IndexSettings(gap=gap)
