"""Packed sources are the sources, in a tenth of the memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from lara_adapter.data import Segment, Source
from lara_adapter.data.packed import PackedSources

ODD = os.fsdecode(b"caf\xe9\n.mp4")


def episodes(count):
    root = Path("/data/set")
    for number in range(count):
        path = root / "videos" / f"chunk-{number // 1000:03d}" / "observation.images.top" / f"episode_{number:06d}.mp4"
        yield Source(path, segments=(Segment(f"{root}#{number}", number, 0.0, 10.0, 300),), root=root)


SOURCES = [
    Source(Path("a.mp4")), Source(Path("/x") / ODD), Source(Path("/"), "pictures", fps=12.5), Source(Path(".")),
    *episodes(3),
    Source(Path("/set/data.parquet"), "episode", (Segment("odd", 7, 0.5, 1.5, 30),), 10.0, "top", Path("/set"), "7"),
    Source(Path("/set/a.tar"), inside="clips/é.mp4"),
    Source(Path("/v/file-000.mp4"), segments=tuple(Segment(f"s#{n}", n, n / 3, (n + 1) / 3, 10) for n in range(12))),
]  # fmt: skip


def test_they_are_the_same():
    packed = PackedSources(SOURCES)
    assert list(packed) == SOURCES
    assert len(packed) == len(SOURCES)
    assert packed[-1] == SOURCES[-1]
    assert packed[1::3] == SOURCES[1::3]
    assert packed.lengths().tolist() == [sum(segment.length for segment in source.segments) for source in SOURCES]
    with pytest.raises(IndexError):
        packed[len(SOURCES)]
    assert list(PackedSources([])) == []
    assert PackedSources([]).lengths().tolist() == []


def test_they_are_small():
    tracemalloc.start()
    packed = PackedSources(episodes(5000))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(packed) == 5000
    assert held / 5000 < 200  # of which some belong to the interpreter
