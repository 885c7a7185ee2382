"""Pairs of frames from all clips alike, at several gaps, in one pass over each clip; the same ones every time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.clips import Clip, ClipSource, pick_frames
from ...errors import DatasetError
from ..pixels import resize

__all__ = ["Sample", "pairs_of", "sample_clips"]

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Pairs of one clip: frames [F, 3, S, S] uint8 by place, the places t, and the actions [T, A] if there are any."""

    clip: int
    frames: dict[int, Tensor]
    places: list[int]
    actions: np.ndarray | None


def sample_clips(source: ClipSource, gaps: list[int], pairs: int, size: int) -> tuple[list[Sample], int]:
    """Frames for about `pairs` pairs per gap, from all clips alike; and how many clips could not be read."""
    chosen = source.clips[:: max(1, len(source.clips) // pairs)]
    each = -(-pairs // len(chosen))
    samples, skipped = [], 0
    for number, clip in enumerate(chosen):
        # at random over the places that have a partner at the smallest gap: even steps could beat with a periodic motion
        count = max(1, clip.length - gaps[0])
        places = sorted(np.random.default_rng(number).choice(count, min(each, count), replace=False).tolist())
        wanted = {place + gap for place in places for gap in (0, *gaps) if place + gap < max(clip.length, 1)}
        try:
            frames = pick_frames(source.frames(clip), wanted)
            actions = _actions(source, clip)
        except DatasetError as error:
            if source.dataset is not None:
                raise  # a dataset is to be whole; of a folder of videos the others will do
            logger.warning("left out: %s", error)
            skipped += 1
            continue
        samples.append(Sample(number, {place: _small(frame, size) for place, frame in frames.items()}, places, actions))
    if not samples:
        raise DatasetError(f"{source.name}: none of {skipped} videos can be decoded")
    return samples, skipped


def _actions(source: ClipSource, clip: Clip) -> np.ndarray | None:
    if source.dataset is None or "action" not in source.dataset.features:
        return None
    values = source.dataset.rows(clip.part, ["action"])["action"]  # type: ignore[arg-type]  # a dataset's are episodes
    return values.reshape(len(values), -1)


def _small(frame: np.ndarray, size: int) -> Tensor:
    """[3, S, S] uint8: at the model's size, as it would resize the frame itself."""
    image = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
    return resize(image, size)[0].round().clamp(0, 255).to(torch.uint8)


def pairs_of(samples: list[Sample], gap: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `size` pairs (frame t, frame t + gap), [b, 3, S, S] uint8 each, in the order of samples and t."""
    places = [(s, place) for s in samples for place in s.places if place in s.frames and place + gap in s.frames]
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield (
            torch.stack([sample.frames[place] for sample, place in part]),
            torch.stack([sample.frames[place + gap] for sample, place in part]),
        )
