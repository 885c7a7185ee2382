"""Pairs of frames in a shuffled order that is a pure function of (seed, position): nothing has to be saved to resume.

Video is decoded in chunks, each a run of frames that starts at a key frame where it can. The chunks of an epoch are
permuted and dealt to the processes; each process gathers its chunks into windows of bounded size, shuffles within a
window, and reads the next window while this one is trained on. The pairs of a chunk are shuffled not one by one but
as chains t, t+C, t+2C, ..., in which a frame is the future of one pair and the present of the next: a frame is then
copied and encoded once and not twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import DatasetError
from .chunks import Chunk, chunk_frames, chunk_starts, make_chains, split_chunks
from .decode import read_frames
from .order import Order, WholeOrder, Window
from .selection import IndexedSource
from .sources import shown

__all__ = ["PairBatch", "PairStream", "read_pairs"]


class _Chain(NamedTuple):
    """Pairs of one source of which each begins where the one before ends."""

    source: int
    pairs: list[tuple[int, int]]  # numbers of the present and the future frame
    frames: dict[int, np.ndarray]  # by number; of all chains of the chunk


class PairBatch(NamedTuple):
    """B pairs over F different frames, B < F <= 2 B.

    frames: [F, 3, S, S] uint8.
    present: [B] int64, which frame is I_t.
    future: [B] int64, which one is I_{t+C}.
    where: [B, 2] int64: number of the source, number of the present frame in it.
    epoch: of the first pair.
    """

    frames: Tensor
    present: Tensor
    future: Tensor
    where: Tensor
    epoch: int

    def pair(self) -> tuple[Tensor, Tensor]:
        """I_t and I_{t+C}, [B, 3, S, S] uint8 each."""
        return self.frames[self.present], self.frames[self.future]


class PairStream:
    """An endless stream of batches, epoch after epoch, each pair once in an epoch and on one process.

    A process's last pairs of an epoch share a batch with its first of the next, so that all batches have B pairs.

    Args:
        sources: the indexed sources, the same in every process.
        size: side in pixels of the frames.
        batch: B, pairs of a batch.
        seed: of the order.
        rank: number of this process.
        ranks: how many there are.
        chain: pairs of a chain at most; 1: pairs are independent of each other.
        shuffle_frames: frames of a window; this process holds up to two windows, each of 3 S^2 bytes a frame.
        workers: threads that decode.
        decoder: "av" or "torchcodec", see :func:`~lara_adapter.data.decode.read_frames`.
        order: which chunks are read when, instead of all of `sources` in the order of `seed`, `rank` and `ranks`.

    Raises:
        LaraArgumentError: less video than processes.
    """

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        size: int,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        chain: int = 4,
        shuffle_frames: int = 4096,
        workers: int = 2,
        decoder: str = "av",
        order: Order | None = None,
    ) -> None:
        self.sources, self.size, self.batch, self.chain = sources, size, batch, chain
        self.workers, self.decoder = max(1, workers), decoder
        self.pairs: int | None = None  # of an epoch, of all processes, where that is known
        self._small = False
        if order is None:
            chunks = getattr(sources, "chunks", None)
            chunks = split_chunks(sources) if chunks is None else chunks
            order = WholeOrder(chunks, seed, rank, ranks, shuffle_frames)
            self.pairs = int(chunks["pairs"].sum())
            # what fits into one window altogether is decoded once and not in every epoch
            self._small = int(chunks["frames"].sum()) <= shuffle_frames
        self.order = order

    def batches(self, start: int = 0) -> Generator[PairBatch, None, None]:
        """Batches of this process, from number `start` on; the same whether those before it were read or not."""
        ready: deque[tuple[_Chain, int]] = deque()  # and its epoch
        waiting = 0
        for epoch, skip, chains in self._windows(start * self.batch):
            for chain in chains:
                if skip >= len(chain.pairs):
                    skip -= len(chain.pairs)
                    continue
                rest, skip = chain.pairs[skip:], 0
                ready.append((chain._replace(pairs=rest), epoch))
                waiting += len(rest)
                while waiting >= self.batch:
                    yield self._collate(ready)
                    waiting -= self.batch

    def _collate(self, ready: deque[tuple[_Chain, int]]) -> PairBatch:
        """Take B pairs from the front."""
        pictures: list[np.ndarray] = []
        present: list[int] = []
        future: list[int] = []
        where = []
        epoch = ready[0][1]
        places: dict[tuple[int, int], int] = {}
        while len(present) < self.batch:
            (source, pairs, frames), chain_epoch = ready.popleft()
            room = self.batch - len(present)
            if len(pairs) > room:
                ready.appendleft((_Chain(source, pairs[room:], frames), chain_epoch))
            for pair in pairs[:room]:
                for number, into in zip(pair, (present, future)):
                    if (source, number) not in places:
                        places[source, number] = len(pictures)
                        pictures.append(frames[number])
                    into.append(places[source, number])
                where.append((source, pair[0]))
        frames_ = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return PairBatch(frames_, torch.tensor(present), torch.tensor(future), torch.tensor(where), epoch)

    def _windows(self, skip: int) -> Iterator[tuple[int, int, Iterable[_Chain]]]:
        """Epoch, pairs to pass over, and chains of each window from pair number `skip` on; one is read ahead."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="video")
        ahead: deque[tuple[Window, int, list[Future[list[_Chain]]]]] = deque()
        known: dict[Chunk, Future[list[_Chain]]] = {}

        def read(chunk: Chunk) -> Future[list[_Chain]]:
            if not self._small:
                return pool.submit(self._read, chunk)
            if chunk not in known:
                known[chunk] = pool.submit(self._read, chunk)
            return known[chunk]

        try:
            for window, passed in self.order.windows(skip):
                ahead.append((window, passed, [read(Chunk(*row)) for row in window.chunks.tolist()]))
                if len(ahead) > 1:
                    yield self._shuffle(*ahead.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _shuffle(
        self, window: Window, passed: int, reading: list[Future[list[_Chain]]]
    ) -> tuple[int, int, Iterable[_Chain]]:
        chains = [chain for future in reading for chain in future.result()]
        order = np.random.default_rng(window.seed).permutation(len(chains))
        return window.epoch, passed, (chains[place] for place in order)

    def _read(self, chunk: Chunk) -> list[_Chain]:
        """The chains of a chunk, decoded."""
        source = self.sources[chunk.source]
        starts, numbers = chunk_starts(source, chunk), chunk_frames(source, chunk)
        if len(starts) != chunk.pairs:
            raise DatasetError(f"{shown(source.source.path)} is not what it was when it was indexed")
        pictures = read_frames(source.source, source.pts, source.keys, numbers, self.size, self.decoder)
        frames = dict(zip(numbers.tolist(), pictures))
        chains = make_chains(starts, source.future, self.chain)
        return [_Chain(chunk.source, [(t, int(source.future[t])) for t in chain], frames) for chain in chains]


def read_pairs(
    sources: Sequence[IndexedSource], size: int, count: int, batch: int, decoder: str = "av"
) -> list[tuple[Tensor, Tensor]]:
    """Held-out pairs, spread evenly over all of them: always the same.

    Returns:
        At most `count` pairs in batches (I_t, I_{t+C}), [b, 3, size, size] uint8 each, b <= `batch`.
    """
    known = getattr(sources, "held_out_pairs", None)
    each = np.array([source.held_out.sum() for source in sources], np.int64) if known is None else known
    ends = np.cumsum(each)
    total = int(ends[-1]) if len(ends) else 0
    pairs = []
    for place in np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist():
        number = int(np.searchsorted(ends, place, "right"))
        source = sources[number]
        start = int(np.flatnonzero(source.held_out)[place - ends[number] + each[number]])
        numbers = np.array([start, source.future[start]])
        frames = read_frames(source.source, source.pts, source.keys, numbers, size, decoder)
        pairs.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
    batches = [torch.stack(pairs[first : first + batch]) for first in range(0, len(pairs), batch)]
    return [(stacked[:, 0].contiguous(), stacked[:, 1].contiguous()) for stacked in batches]
