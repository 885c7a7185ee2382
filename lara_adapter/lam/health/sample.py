"""Pairs of frames from all clips alike, at several gaps, in one pass over each clip; the same ones every time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.dataset import Dataset
from ...errors import DatasetError
from ..pixels import resize
from ..processes import Processes

__all__ = ["Sample", "describe_not_finite", "iter_pairs", "sample_episodes"]


class Sample(NamedTuple):
    """Pairs of one episode: frames [3, S, S] uint8 by place, the places t, and what the dataset has of the rest."""

    number: int
    frames: dict[int, Tensor]
    places: list[int]
    actions: np.ndarray | None  # [T, A]
    states: np.ndarray | None = None  # [T, K]
    tasks: np.ndarray | None = None  # [T] int


def sample_episodes(
    dataset: Dataset, camera: str, gaps: list[int], pairs: int, size: int, processes: Processes
) -> list[Sample]:
    """Frames for about `pairs` pairs per gap, from all episodes alike; damaged ones are left out of the dataset.

    Each process decodes its share; all have the result.

    Raises:
        DatasetError: all of them are damaged.
    """
    step = max(1, len(dataset.episodes) // pairs)
    chosen = [dataset.episodes[place] for place in range(0, len(dataset.episodes), step)]
    mine = range(processes.index, len(chosen), processes.count)
    share = -(-pairs // len(chosen))
    own = processes.each(lambda: [_sample(dataset, camera, chosen[seed], seed, gaps, share, size) for seed in mine])
    found = [each for part in processes.gather(own) for each in part]
    dataset.leave_out({number: each for number, each in found if isinstance(each, str)})
    samples = sorted((each for _, each in found if isinstance(each, Sample)), key=lambda sample: sample.number)
    if not samples:
        raise DatasetError(f"{dataset.name}: none of the {len(chosen)} episodes that were looked at can be decoded")
    return samples


def _sample(
    dataset: Dataset, camera: str, episode: Any, seed: int, gaps: list[int], share: int, size: int
) -> tuple[int, Sample | str]:
    """The number of an episode, and its frames for `share` pairs or what is wrong with it."""
    # at random over the places that have a partner at the smallest gap: even steps could beat with a periodic motion
    count = max(1, episode.length - gaps[0])
    places = sorted(np.random.default_rng(seed).choice(count, min(share, count), replace=False).tolist())
    needed = {place + gap for place in places for gap in (0, *gaps) if place + gap < max(episode.length, 1)}
    try:
        frames = dataset.pick(camera, episode, needed)
        columns = dataset.actions(episode), dataset.states(episode), dataset.tasks(episode)
    except DatasetError as error:
        return episode.number, str(error)
    small = {place: _to_size(frame, size) for place, frame in frames.items()}
    return episode.number, Sample(episode.number, small, places, *columns)


def describe_not_finite(samples: list[Sample]) -> str:
    """Where actions are NaN or infinite: episode, column and frames; empty if nowhere."""
    found = []
    for sample in samples:
        bad = np.zeros((0, 0), bool) if sample.actions is None else ~np.isfinite(sample.actions)
        for column in np.flatnonzero(bad.any(0)).tolist():
            frames = np.flatnonzero(bad[:, column])
            found.append(f"episode {sample.number}, action[{column}], {len(frames)} frames from {frames[0]} on")
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


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
