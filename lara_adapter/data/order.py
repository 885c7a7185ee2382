"""Which chunks are read when: a pure function of (seed, position), so that nothing has to be saved to resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import LaraArgumentError

__all__ = ["Order", "WholeOrder", "Window", "split_windows"]


class Window(NamedTuple):
    """Chunks whose pairs are shuffled together."""

    epoch: int
    seed: Sequence[int]  # of their order
    chunks: np.ndarray  # [n] of CHUNK


class Order(Protocol):
    """The windows of one process."""

    def windows(self, skip: int) -> Iterator[tuple[Window, int]]:
        """All windows from the one on that holds pair number `skip`, each with how many of its pairs come before that."""


def split_windows(chunks: np.ndarray, frames: int) -> list[np.ndarray]:
    """Divide chunks [n] of CHUNK, in their order, into stretches of about that many frames."""
    window = (np.cumsum(chunks["frames"], dtype=np.int64) - 1) // frames
    return np.split(chunks, np.flatnonzero(np.diff(window)) + 1)


class WholeOrder:
    """All chunks are known: those of an epoch are permuted and dealt to the processes.

    Args:
        chunks: [C] of CHUNK, the same in every process.
        seed: of the order.
        rank: number of this process.
        ranks: how many there are.
        shuffle_frames: frames of a window.

    Raises:
        LaraArgumentError: fewer chunks than processes.
    """

    def __init__(self, chunks: np.ndarray, seed: int, rank: int, ranks: int, shuffle_frames: int) -> None:
        self.chunks, self.seed, self.rank, self.ranks, self.shuffle_frames = chunks, seed, rank, ranks, shuffle_frames
        if len(chunks) < ranks:
            raise LaraArgumentError(
                f"{len(chunks)} chunks of video ({chunks['pairs'].sum()} pairs) for {ranks} processes: use fewer processes"
            )

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The chunks of each window of this process in an epoch."""
        permuted = np.random.default_rng([self.seed, epoch]).permutation(len(self.chunks))
        return split_windows(self.chunks[permuted[self.rank :: self.ranks]], self.shuffle_frames)

    def windows(self, skip: int) -> Iterator[tuple[Window, int]]:
        """See :class:`Order`."""
        for epoch in itertools.count():
            for number, chunks in enumerate(self.epoch(epoch)):
                pairs = int(chunks["pairs"].sum())
                if skip < pairs:
                    yield Window(epoch, [self.seed, epoch, number, self.rank], chunks), skip
                skip = max(0, skip - pairs)
