"""The stream of pairs: every pair once an epoch, on one process, from any position, in bounded memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from helpers.videos import number_of, numbered, write_video

import lara_adapter.data.pairs as pairs_module
from lara_adapter import LaraArgumentError
from lara_adapter.data import IndexSettings, PairStream, build_index, find_sources
from lara_adapter.data.chunks import make_chains
from lara_adapter.data.gap import Gap
from lara_adapter.data.pairs import read_pairs

LENGTHS = {"a.mp4": 150, "b.mkv": 40, "c.avi": 90, "d.mp4": 11}
PAIRS = sum(LENGTHS.values()) - 5 * len(LENGTHS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for video, (name, length) in enumerate(LENGTHS.items()):
        write_video(folder / name, numbered(length, video), "libx264" if name == "a.mp4" else "mpeg4", g=24)
    settings = IndexSettings(gap=Gap(5), held_out=0.0, cut_threshold=0.0, still_threshold=0.0)
    return build_index(find_sources([folder]), settings, folder / "index").sources


def take(stream, count, start=0):
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def where(batches):
    return [tuple(row) for batch in batches for row in batch.where.tolist()]


@pytest.mark.parametrize("chain", [1, 4])
@pytest.mark.parametrize("shuffle_frames", [60, 4096])
def test_every_pair_once_an_epoch_and_the_frames_are_the_right_ones(clips, chain, shuffle_frames):
    stream = PairStream(clips, 64, 8, chain=chain, shuffle_frames=shuffle_frames)
    assert stream.pairs == PAIRS
    batches = take(stream, 2 * PAIRS // 8)
    seen = where(batches)
    assert len(set(seen[:PAIRS])) == PAIRS
    assert max(Counter(seen).values()) == 2
    assert seen[:PAIRS] != seen[PAIRS : 2 * PAIRS]
    video_of = [int(number_of(take_frame(clip, 0))[0]) for clip in clips]
    for batch in batches[:12]:
        assert batch.frames.dtype.is_floating_point is False
        present, future = batch.pair()
        for row, (clip, start) in enumerate(batch.where.tolist()):
            assert number_of(present[row]) == (video_of[clip], start)
            assert number_of(future[row]) == (video_of[clip], start + 5)


def take_frame(clip, number):
    return pairs_module.read_frames(clip.source, clip.pts, clip.keys, np.array([number]), 64)[0]


def test_a_frame_that_belongs_to_two_pairs_is_there_once(clips):
    for batch in take(PairStream(clips, 64, 16, chain=8, shuffle_frames=4096), 8):
        numbers = [number_of(frame) for frame in batch.frames]
        assert len(set(numbers)) == len(numbers)
    sizes = [np.mean([len(b.frames) for b in take(PairStream(clips, 64, 16, chain=c), 12)]) / 16 for c in (1, 2, 8)]
    assert sizes[0] > 1.7
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1.3


def test_the_order_is_shuffled_over_videos_and_by_the_seed(clips):
    first = take(PairStream(clips, 64, 32), 4)
    assert all(len(set(batch.where[:, 0].tolist())) > 1 for batch in first)
    assert where(first) == where(take(PairStream(clips, 64, 32, workers=4), 4))
    assert where(first) != where(take(PairStream(clips, 64, 32, seed=1), 4))


@pytest.mark.parametrize("shuffle_frames", [60, 4096])
@pytest.mark.parametrize("start", [1, 7, 40, 100])
def test_from_any_position_the_same_batches_follow(clips, start, shuffle_frames):
    whole = take(PairStream(clips, 64, 8, shuffle_frames=shuffle_frames), start + 5)[start:]
    rest = take(PairStream(clips, 64, 8, shuffle_frames=shuffle_frames), 5, start)
    for one, other in zip(whole, rest, strict=True):
        assert one.epoch == other.epoch
        for name in ("frames", "present", "future", "where"):
            assert (getattr(one, name) == getattr(other, name)).all()


def test_skipped_batches_are_not_decoded(clips, monkeypatch):
    stream = PairStream(clips, 64, 8, shuffle_frames=60)
    read = []
    monkeypatch.setattr(stream, "_read", lambda number: (read.append(number), PairStream._read(stream, number))[1])
    take(stream, 1, 10 * PAIRS // 8)
    assert len(read) <= 6


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_take_disjoint_pairs_and_together_all(clips, ranks):
    shares = []
    for rank in range(ranks):
        stream = PairStream(clips, 64, 1, rank=rank, ranks=ranks, shuffle_frames=100)
        count = sum(int(window["pairs"].sum()) for window in stream.order.epoch(0))
        shares.append(where(take(stream, count)))
    together = list(itertools.chain(*shares))
    assert len(set(together)) == len(together) == PAIRS


def test_fewer_chunks_than_processes_is_refused(clips):
    with pytest.raises(LaraArgumentError, match="for 50 processes"):
        PairStream(clips, 64, 8, ranks=50)


def test_a_small_collection_is_decoded_once(clips, monkeypatch):
    decoded = []
    real = pairs_module.read_frames
    monkeypatch.setattr(pairs_module, "read_frames", lambda *a: (decoded.append(1), real(*a))[1])
    stream = PairStream(clips, 64, 8, shuffle_frames=4096)
    take(stream, 3 * PAIRS // 8)
    assert len(decoded) == len(clips.chunks)
    decoded.clear()
    stream = PairStream(clips, 64, 8, shuffle_frames=100)
    take(stream, 3 * PAIRS // 8)
    assert len(decoded) > 2 * len(clips.chunks)


def test_an_error_while_reading_is_raised_in_training(clips, monkeypatch):
    monkeypatch.setattr(pairs_module, "read_frames", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        take(PairStream(clips, 64, 8), 1)


def test_chains():
    future = np.arange(40) + 5
    chains = make_chains(np.array([0, 1, 5, 6, 10, 15, 20, 31]), future, 3)
    assert chains == [[0, 5, 10], [1, 6], [15, 20], [31]]
    assert make_chains(np.arange(30), future, 1) == [[t] for t in range(30)]


def test_held_out_pairs_are_spread_and_always_the_same(tmp_path):
    for video in range(4):
        write_video(tmp_path / f"{video}.mp4", numbered(50, video))
    settings = IndexSettings(held_out=0.5, cut_threshold=0.0, still_threshold=0.0)
    clips = build_index(find_sources([tmp_path]), settings, tmp_path / "index").sources
    first, again = (read_pairs(clips, 32, 20, 8) for _ in range(2))
    assert [len(present) for present, _ in first] == [8, 8, 4]
    assert all((a == b).all() for one, two in zip(first, again) for a, b in zip(one, two))
    looks = [(number_of(a), number_of(b)) for present, future in first for a, b in zip(present, future)]
    assert all(b == (a[0], a[1] + 5) for a, b in looks)
    assert len({a[0] for a, _ in looks}) == sum(clip.held_out.any() for clip in clips) > 0
    assert read_pairs(clips, 32, 10**6, 8)


MEMORY = """
import resource, sys
from lara_adapter.data import IndexSettings, PairStream, build_index, find_sources
for folder in sys.argv[1:]:
    settings = IndexSettings(held_out=0.0, cut_threshold=0.0, still_threshold=0.0)
    clips = build_index(find_sources([folder]), settings, folder + "/index").sources
    stream = PairStream(clips, 128, 8, shuffle_frames=256)
    batches = stream.batches()
    for _ in range(stream.pairs // 8):
        next(batches)
    batches.close()
    print(stream.pairs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """Indexed and streamed once, the short one first: the peak of the process is then that of the longer one."""
    short = list(numbered(300))
    for frames in (300, 2400):
        write_video(tmp_path / str(frames) / "a.mp4", itertools.islice(itertools.cycle(short), frames), g=50)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "300"), str(tmp_path / "2400")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (few, before), (many, after) = (line.split() for line in done.stdout.splitlines())
    assert (int(few), int(many)) == (295, 2395)
    assert float(after) - float(before) < 40  # the longer one's frames are 118 MB
