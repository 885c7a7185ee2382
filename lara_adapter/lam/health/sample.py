"""Pairs of frames from all clips alike, at several gaps, in one pass over each clip; the same ones every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.clips import Clip, ClipSource
from ...data.episodes import Episode
from ...errors import DatasetError
from ..pixels import resize

__all__ = ["Sample", "iter_pairs", "sample_clips"]


class Sample(NamedTuple):
    """Pairs of one clip: frames [3, S, S] uint8 by place, the places t, and the actions [T, A] if there are any."""

    clip: int
    frames: dict[int, Tensor]
    places: list[int]
    actions: np.ndarray | None


def sample_clips(source: ClipSource, gaps: list[int], pairs: int, size: int) -> tuple[list[Sample], int]:
    """Frames for about `pairs` pairs per gap, from all clips alike; and how many damaged clips were left out."""
    clips = source.clips[:: max(1, len(source.clips) // pairs)]
    share = -(-pairs // len(clips))
    samples = []
    for number, clip in enumerate(clips):
        # at random over the places that have a partner at the smallest gap: even steps could beat with a periodic motion
        count = max(1, clip.length - gaps[0])
        places = sorted(np.random.default_rng(number).choice(count, min(share, count), replace=False).tolist())
        needed = {place + gap for place in places for gap in (0, *gaps) if place + gap < max(clip.length, 1)}
        frames = source.pick(clip, needed)
        if frames is not None:
            small = {place: _to_size(frame, size) for place, frame in frames.items()}
            samples.append(Sample(number, small, places, _actions(source, clip)))
    if not samples:
        raise DatasetError(f"{source.name}: none of {len(clips)} videos can be decoded")
    return samples, len(clips) - len(samples)


def _actions(source: ClipSource, clip: Clip) -> np.ndarray | None:
    if source.dataset is None or not isinstance(clip.part, Episode) or "action" not in source.dataset.features:
        return None
    values = source.dataset.rows(clip.part, ["action"])["action"]
    return values.reshape(len(values), -1)


def _to_size(frame: np.ndarray, size: int) -> Tensor:
    """[3, S, S] uint8."""
    return resize(torch.from_numpy(frame).permute(2, 0, 1), size)


def iter_pairs(samples: list[Sample], gap: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `size` pairs (frame t, frame t + gap), [b, 3, S, S] uint8 each, in the order of samples and t."""
    places = [(s, place) for s in samples for place in s.places if place in s.frames and place + gap in s.frames]
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield (
            torch.stack([sample.frames[place] for sample, place in part]),
            torch.stack([sample.frames[place + gap] for sample, place in part]),
        )
