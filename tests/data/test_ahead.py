"""Indexing ahead of the training: every pair once an epoch, the same from any position, without looking at everything."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections import Counter

import numpy as np
import pytest
from helpers.scans import made_up_frames, made_up_sources

import lara_adapter.data.ahead as ahead_module
import lara_adapter.data.pairs as pairs_module
import lara_adapter.data.scan_cache as scan_cache
from lara_adapter import DatasetError, LaraArgumentError
from lara_adapter.data import IndexSettings, PairStream, Segment, build_index
from lara_adapter.data.ahead import AheadIndex
from lara_adapter.data.pairs import read_pairs
from lara_adapter.data.scan import Scan

SETTINGS = IndexSettings(held_out=0.1, cut_threshold=0.0, still_threshold=0.0)
LENGTH = 60  # frames of each source; 55 pairs
COUNT = 120


def plain_scan(source, gap):
    frames = np.arange(LENGTH)
    future = np.where(frames + gap.frames < LENGTH, frames + gap.frames, -1).astype(np.int32)
    zeros = np.zeros(LENGTH, np.float32)
    return Scan(frames * 512, frames / 30, frames % 10 == 0, np.zeros(LENGTH, bool), zeros, future, zeros)


@pytest.fixture
def scanned(monkeypatch):
    """Names of the files that are scanned; short stretches."""
    names = []

    def scan(source, gap):
        names.append(source.path.name)
        return plain_scan(source, gap)

    monkeypatch.setattr(scan_cache, "scan_source", scan)
    monkeypatch.setattr(pairs_module, "read_frames", made_up_frames)
    monkeypatch.setattr(ahead_module, "_FIRST", 4000)
    monkeypatch.setattr(ahead_module, "_LONGEST", 16000)
    return names


def stream_of(tmp_path, count=COUNT, batch=8, sources=None, shuffle_frames=400, **options):
    sources = made_up_sources(tmp_path, [0] * count) if sources is None else sources
    ahead = AheadIndex(sources, SETTINGS, tmp_path / "index", shuffle_frames=shuffle_frames, **options)
    return ahead, PairStream(ahead.sources, 4, batch, chain=1, order=ahead)


def take(stream, count, start=0):
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def where(batches, epoch=None):
    return [tuple(row) for batch in batches for row in batch.where.tolist() if epoch is None or batch.epoch == epoch]


def same(one, other):
    return all(
        a.epoch == b.epoch and all((x == y).all() for x, y in zip(a[:4], b[:4]))
        for a, b in zip(one, other, strict=True)
    )


def trained(ahead):
    return {number for number in range(COUNT) if str(ahead._packed[number].path) not in ahead.held}


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_pair_once_an_epoch_and_on_one_process(tmp_path, scanned, ranks):
    seen = []
    for rank in range(ranks):
        ahead, stream = stream_of(tmp_path, batch=55, rank=rank, ranks=ranks, seed=5)
        mine = where(itertools.takewhile(lambda batch: batch.epoch == 0, stream.batches()))
        assert mine != sorted(mine)
        seen += mine
    assert Counter(seen) == Counter((number, t) for number in trained(ahead) for t in range(55))
    assert 0 < len(ahead.held) < 30


def test_another_epoch_comes_in_another_order(tmp_path, scanned):
    ahead, stream = stream_of(tmp_path, batch=55)
    pairs = 55 * len(trained(ahead))
    seen = where(take(stream, 2 * pairs // 55))
    assert sorted(seen[:pairs]) == sorted(seen[pairs:])
    assert seen[:pairs] != seen[pairs:]
    assert len({number for number, _ in seen[:32]}) > 3


def test_the_first_step_waits_for_the_first_stretch_only(tmp_path, monkeypatch, scanned):
    allowed = threading.Semaphore(4)  # sources of the first stretch
    done = []

    def scan(source, gap):
        allowed.acquire()
        done.append(source)
        return plain_scan(source, gap)

    monkeypatch.setattr(scan_cache, "scan_source", scan)
    _, stream = stream_of(tmp_path, shuffle_frames=80)  # three windows
    batches = stream.batches()
    next(batches)
    assert len(done) == 4
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 5  # what is being scanned is not waited for
    for _ in range(COUNT):
        allowed.release()


@pytest.mark.parametrize("start", [1, 27, 30, 200, 900])
@pytest.mark.parametrize("journal", [True, False])
def test_from_any_position_the_same_batches_follow(tmp_path, scanned, start, journal):
    whole = take(stream_of(tmp_path, rank=1, ranks=2)[1], start + 6)[start:]
    if not journal:
        for path in (tmp_path / "index").glob("*.jsonl"):
            path.unlink()
    assert same(whole, take(stream_of(tmp_path, rank=1, ranks=2)[1], 6, start))
    (tmp_path / "index").rename(tmp_path / "lost")
    assert same(whole, take(stream_of(tmp_path, rank=1, ranks=2)[1], 6, start))


def test_stretches_that_were_passed_are_not_read_again(tmp_path, scanned, monkeypatch):
    take(stream_of(tmp_path)[1], 700)
    read = []
    real = scan_cache.read_scan
    monkeypatch.setattr(scan_cache, "read_scan", lambda *a: (read.append(1), real(*a))[1])
    take(stream_of(tmp_path)[1], 1, 600)
    assert len(read) < 60


def test_what_cannot_be_read_is_named_when_it_is_met_and_tried_again_later(tmp_path, scanned, monkeypatch, caplog):
    sources = made_up_sources(tmp_path, [0] * COUNT)
    ahead, stream = stream_of(tmp_path)
    broken = sources[where(take(stream, 1))[0][0]].path.name

    def scan(source, gap):
        if source.path.name == broken:
            raise DatasetError(f"{source.path} cannot be opened: the disk sleeps")
        return plain_scan(source, gap)

    (tmp_path / "index").rename(tmp_path / "lost")
    with monkeypatch.context() as patch:
        patch.setattr(scan_cache, "scan_source", scan)
        ahead, stream = stream_of(tmp_path)
        ahead.begin()
        with caplog.at_level(logging.WARNING):
            first = take(stream, 40)
    assert caplog.text.count("the disk sleeps") == 1
    (fault,) = ahead.report()["faults"]
    assert fault["used"] == "no"
    assert broken in fault["file"]
    number = int(broken.partition(".")[0])
    assert number not in {source for source, _ in where(first)}
    # the run goes on: the stretch is as it was; the next epoch has the source
    ahead, stream = stream_of(tmp_path)
    assert same(first[10:], take(stream, 30, 10))
    pairs = 55 * (len(trained(ahead)) - 1)
    assert number in {source for source, _ in where(take(stream, 2 * pairs // 8), 1)}
    # another run has it at once
    ahead, stream = stream_of(tmp_path)
    ahead.begin()
    assert number in {source for source, _ in where(take(stream, pairs // 8), 0)}
    assert not ahead.report()["faults"]


def test_a_damaged_episode_is_left_out_and_the_others_of_its_file_are_used(tmp_path, monkeypatch, scanned, caplog):
    def scan(source, gap):
        found = plain_scan(source, gap)
        if source.path.stem == "3":
            found.broken[25] = True
        return found

    monkeypatch.setattr(scan_cache, "scan_source", scan)
    sources = [
        source._replace(
            segments=tuple(
                Segment(f"set#{number * 3 + n}", number * 3 + n, n * 20 / 30, (n + 1) * 20 / 30, 20) for n in range(3)
            )
        )
        for number, source in enumerate(made_up_sources(tmp_path, [0] * 20))
    ]
    ahead, stream = stream_of(tmp_path, sources=sources, batch=15)
    seen = where(itertools.takewhile(lambda batch: batch.epoch == 0, stream.batches()))
    report = ahead.report()
    assert [fault["used"] for fault in report["faults"]] == ["left out"]
    assert "episode 10 is damaged" in report["faults"][0]["what"]
    assert "episode 10 is damaged" in caplog.text
    assert not {(3, t) for t in range(20, 40)} & set(seen)
    held = {int(group.partition("#")[2]) for group in ahead.held}
    expected = Counter((n // 3, n % 3 * 20 + t) for n in range(60) if n not in held | {10} for t in range(15))
    assert Counter(seen) == expected
    whole = build_index(sources, SETTINGS, tmp_path / "index", log=False).report
    assert whole["pairs"] == report["pairs"] == len(seen)
    assert whole["faults"] == report["faults"]


def test_the_report_grows_with_what_was_met_by_all_processes(tmp_path, scanned):
    streams = [stream_of(tmp_path, rank=rank, ranks=2) for rank in range(2)]
    pairs = streams[0][0].held_out(20)
    assert 1 <= len(pairs) < 5
    for _, stream in streams:
        take(stream, 1)
    early = streams[0][0].report()
    assert 0 < early["scanned"] < COUNT
    assert early["sources"] == COUNT
    for _, stream in streams:
        take(stream, 55 * COUNT // 16)
    late = streams[0][0].report()
    assert late["pairs"] == 55 * len(trained(streams[0][0]))
    assert late["held_out_pairs"] == 55 * len(pairs)
    assert late["scanned"] == late["usable"] == len(trained(streams[0][0])) + len(pairs)


def test_held_out_sources_are_those_of_a_collection_that_is_indexed_whole(tmp_path, scanned):
    ahead, _ = stream_of(tmp_path)
    few = ahead.held_out(20)
    assert few == ahead.held_out(20) or [s.source for s in few] == [s.source for s in ahead.held_out(20)]
    assert len(scanned) < 20
    assert sum(len(present) for present, _ in read_pairs(few, 4, 20, 8)) == 20
    whole = build_index(made_up_sources(tmp_path, [0] * COUNT), SETTINGS, tmp_path / "index").sources
    held = {indexed.source for indexed in whole if indexed.held_out.any()}
    assert {indexed.source for indexed in few} < held
    assert {str(source.path) for source in held} == ahead.held


def test_of_a_single_video_the_end_is_held_out(tmp_path, scanned):
    ahead, stream = stream_of(tmp_path, count=1, batch=1)
    (only,) = ahead.held_out(4)
    assert np.flatnonzero(only.held_out).tolist() == [54]
    assert {t for _, t in where(take(stream, 100))} == set(range(49))


def test_refusals(tmp_path, monkeypatch, scanned):
    with pytest.raises(LaraArgumentError, match="for 50 processes"):
        stream_of(tmp_path, count=20, ranks=50)

    def scan(source, gap):
        raise DatasetError(f"{source.path} is empty")

    monkeypatch.setattr(scan_cache, "scan_source", scan)
    with pytest.raises(LaraArgumentError, match=r"no usable video among 30 sources .*is empty"):
        take(stream_of(tmp_path, count=30)[1], 1)


def test_a_torn_line_of_the_journal_is_passed_over(tmp_path, scanned):
    ahead, stream = stream_of(tmp_path)
    first = take(stream, 300)
    text = ahead.journal.path.read_text()
    ahead.journal.path.write_text(text[: len(text) - 30])
    assert json.loads(text.splitlines()[0])["stretch"] == 0
    assert same(first[200:], take(stream_of(tmp_path)[1], 100, 200))


def test_stretches_are_as_long_as_the_files(tmp_path, scanned):
    (tmp_path / "v").mkdir()
    for number, size in enumerate([100, 100, 30_000_000, 100] * 5):  # 100 frames, or 6000
        with (tmp_path / "v" / f"{number}.mp4").open("wb") as file:
            file.truncate(size)
    ahead, _ = stream_of(tmp_path, count=20)
    stretches = list(itertools.takewhile(lambda stretch: stretch.epoch == 0, ahead._plan()))
    frames = [sum(6000 if number % 4 == 2 else 100 for number in stretch.sources) for stretch in stretches]
    assert len(frames) > 2
    assert all(most <= many < most + 6000 for many, most in zip(frames[:-1], (4000, 8000, 16000)))
    assert sorted(number for stretch in stretches for number in stretch.sources) == sorted(ahead._trained)
