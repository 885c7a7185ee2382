"""How a source is divided: chunks, which are decoded in one go, and chains of pairs that share frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .selection import IndexedSource

__all__ = ["CHUNK", "Chunk", "chunk_frames", "chunk_starts", "make_chains", "split_chunks"]

_CHUNK = 64  # present frames of a chunk at least, ...
_LONGEST = 256  # ... and at most, where key frames are far apart


class Chunk(NamedTuple):
    """Presents first <= t < stop of a source that are trained on."""

    source: int
    first: int
    stop: int
    pairs: int
    frames: int


CHUNK = np.dtype([(name, np.int32) for name in Chunk._fields])  # a collection has millions of them


def make_chains(starts: np.ndarray, future: np.ndarray, longest: int) -> list[list[int]]:
    """Order pairs into chains in which the future of each is the present of the next.

    Args:
        starts: [n] int, rising: the presents.
        future: [T] int, the future of every frame.
        longest: pairs of a chain at most, >= 1.

    Returns:
        Lists of presents; each present is in exactly one.
    """
    left = dict.fromkeys(starts.tolist())
    chains = []
    for start in starts.tolist():
        if start not in left:
            continue
        chain: list[int] = []
        while start in left and len(chain) < longest:
            del left[start]
            chain.append(start)
            start = int(future[start])
        chains.append(chain)
    return chains


def chunk_starts(source: IndexedSource, chunk: Chunk) -> np.ndarray:
    """Numbers of the presents of a chunk that are trained on."""
    return chunk.first + np.flatnonzero(source.train[chunk.first : chunk.stop])


def chunk_frames(source: IndexedSource, chunk: Chunk) -> np.ndarray:
    """Numbers of the frames that the pairs of a chunk are made of."""
    starts = chunk_starts(source, chunk)
    return np.union1d(starts, source.future[starts])


def split_chunks(sources: Sequence[IndexedSource], first: int = 0) -> np.ndarray:
    """Divide sources into chunks: within an episode, at key frames where there are enough of them.

    Args:
        sources: what to divide.
        first: number of the first one.

    Returns:
        [C] of :data:`CHUNK`.
    """
    rows = [chunk for number, source in enumerate(sources, first) for chunk in _chunks(number, source)]
    return np.array(rows, CHUNK)


def _chunks(number: int, source: IndexedSource) -> Iterator[Chunk]:
    for begin, end in zip(source.parts[:-1].tolist(), source.parts[1:].tolist()):
        first = begin
        while first < end:
            later = source.keys[np.searchsorted(source.keys, first + _CHUNK) :][:1].tolist()
            stop = min(*later, first + _LONGEST, end) if later else min(first + _LONGEST, end)
            if end - stop < _CHUNK // 2 and end - first <= _LONGEST:
                stop = end  # no tiny last chunk
            chunk = Chunk(number, first, stop, int(source.train[first:stop].sum()), 0)
            if chunk.pairs:
                yield chunk._replace(frames=len(chunk_frames(source, chunk)))
            first = stop
