"""Made-up scans of files that are not there, so that large collections cost nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lara_adapter.data import Gap, Segment, Source
from lara_adapter.data.scan import Scan


def frames_of(number: int) -> int:
    """Frames of the video of that number."""
    return 40 + 97 * number


def made_up_scan(source: Source, gap: Gap) -> Scan:
    """A scan that follows from the number in a file's name: cuts, still stretches, damage, key frames near and far."""
    number = int(source.path.stem)
    rng = np.random.default_rng(number)
    total = frames_of(number)
    frames = np.arange(total)
    change = rng.uniform(0, 0.05, total).astype(np.float32)
    change[rng.integers(1, total, 2)] = 0.9
    motion = np.where(frames // 50 % 4 == 3, 0.0, 0.5).astype(np.float32)
    broken = np.zeros(total, bool)
    if number == 4:
        broken[200] = True
    future = np.where(frames + gap.frames < total, frames + gap.frames, -1).astype(np.int32)
    key = frames % (24, 100, total)[number % 3] == 0
    return Scan(frames * 512, frames / 30, key, broken, change, future, motion)


def made_up_frames(source, pts, keys, numbers, size, decoder="av"):
    """In place of `read_frames`: every pixel is the frame's number modulo 251."""
    return np.stack([np.full((size, size, 3), number % 251, np.uint8) for number in numbers.tolist()])


def made_up_sources(folder: Path, episodes: list[int]) -> list[Source]:
    """A source for each entry: a video, or one that holds that many episodes."""
    sources = []
    for number, count in enumerate(episodes):
        length = frames_of(number) // max(count, 1)
        segments = tuple(Segment(f"set#{n}", n, n * length / 30, (n + 1) * length / 30, length) for n in range(count))
        # a hash of the last two parts of the path chooses what is held out
        sources.append(Source(folder / "v" / f"{number}.mp4", segments=segments, root=folder if segments else Path()))
    return sources
