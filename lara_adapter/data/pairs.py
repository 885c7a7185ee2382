"""Pairs of frames in a shuffled order that is a pure function of (seed, position): nothing has to be saved to resume.

Video is decoded in chunks, each a run of frames that starts at a key frame where it can. The chunks of an epoch are
permuted and dealt to the processes; each process gathers its chunks into windows of bounded size, shuffles within a
window, and reads the next window while this one is trained on. The pairs of a chunk are shuffled not one by one but
as chains t, t+C, t+2C, ..., in which a frame is the future of one pair and the present of the next: a frame is then
copied and encoded once and not twice.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import LaraArgumentError
from .chunks import chunk_frames, chunk_starts, make_chains, split_chunks
from .decode import read_frames
from .index import IndexedSource

__all__ = ["PairBatch", "PairStream", "read_pairs"]


_Chain = tuple[int, list[int], dict[int, np.ndarray]]  # source, presents, frames by number


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

    Raises:
        LaraArgumentError: less video than processes.
    """

    def __init__(
        self,
        sources: list[IndexedSource],
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
    ) -> None:
        self.sources, self.size, self.batch, self.seed = sources, size, batch, seed
        self.rank, self.ranks, self.chain, self.shuffle_frames = rank, ranks, chain, shuffle_frames
        self.workers, self.decoder = max(1, workers), decoder
        self.chunks = [chunk for number, source in enumerate(sources) for chunk in split_chunks(number, source)]
        self.sizes = np.array([(chunk.pairs, chunk.frames) for chunk in self.chunks], np.int64).reshape(-1, 2)
        self.pairs = int(self.sizes[:, 0].sum())
        if len(self.chunks) < ranks:
            raise LaraArgumentError(
                f"{len(self.chunks)} chunks of video ({self.pairs} pairs) for {ranks} processes: use fewer processes"
            )

    def batches(self, start: int = 0) -> Generator[PairBatch, None, None]:
        """Batches of this process, from number `start` on; the same whether those before it were read or not."""
        skip = start * self.batch
        ready: deque[tuple[_Chain, int]] = deque()  # and its epoch
        waiting = 0
        for epoch, window in self._windows(skip):
            for source, chain, frames in window:
                if skip >= len(chain):
                    skip -= len(chain)
                    continue
                chain, skip = chain[skip:], 0
                ready.append(((source, chain, frames), epoch))
                waiting += len(chain)
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
            (source, chain, frames), chain_epoch = ready.popleft()
            room = self.batch - len(present)
            if len(chain) > room:
                ready.appendleft(((source, chain[room:], frames), chain_epoch))
            for start in chain[:room]:
                for number, into in ((start, present), (int(self.sources[source].future[start]), future)):
                    if (source, number) not in places:
                        places[source, number] = len(pictures)
                        pictures.append(frames[number])
                    into.append(places[source, number])
                where.append((source, start))
        frames_ = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        return PairBatch(frames_, torch.tensor(present), torch.tensor(future), torch.tensor(where), epoch)

    # ------------------------------------------------------------------ order

    def order(self, epoch: int) -> list[np.ndarray]:
        """The windows of this process in an epoch: numbers of chunks."""
        permuted = np.random.default_rng([self.seed, epoch]).permutation(len(self.chunks))
        mine = permuted[self.rank :: self.ranks]
        window = (np.cumsum(self.sizes[mine, 1]) - 1) // self.shuffle_frames
        return np.split(mine, np.flatnonzero(np.diff(window)) + 1)

    def _windows(self, skip: int) -> Iterator[tuple[int, Iterable[_Chain]]]:
        """Epoch and content of each window, in order; one is read ahead. Windows that `skip` passes over are not read."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="video")
        ahead: deque[tuple[int, int, np.ndarray, list[Future[np.ndarray]]]] = deque()
        # what fits into one window altogether is decoded once and not in every epoch
        small = int(self.sizes[:, 1].sum()) <= self.shuffle_frames
        known: dict[int, Future[np.ndarray]] = {}

        def read(chunk: int) -> Future[np.ndarray]:
            if not small:
                return pool.submit(self._read, chunk)
            if chunk not in known:
                known[chunk] = pool.submit(self._read, chunk)
            return known[chunk]

        try:
            for epoch in itertools.count():
                for number, window in enumerate(self.order(epoch)):
                    pairs = int(self.sizes[window, 0].sum())
                    if skip >= pairs:
                        skip -= pairs
                        yield epoch, [(0, [0] * pairs, {})]
                        continue
                    skip = 0
                    ahead.append((epoch, number, window, [read(chunk) for chunk in window.tolist()]))
                    if len(ahead) > 1:
                        yield self._content(*ahead.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _content(
        self, epoch: int, number: int, window: np.ndarray, reading: list[Future[np.ndarray]]
    ) -> tuple[int, Iterable[_Chain]]:
        """The chains of a window, shuffled."""
        chains: list[_Chain] = []
        for chunk_number, future in zip(window.tolist(), reading):
            chunk = self.chunks[chunk_number]
            source = self.sources[chunk.source]
            frames = dict(zip(chunk_frames(source, chunk).tolist(), future.result()))
            made = make_chains(chunk_starts(source, chunk), source.future, self.chain)
            chains += [(chunk.source, chain, frames) for chain in made]
        order = np.random.default_rng([self.seed, epoch, number, self.rank]).permutation(len(chains))
        return epoch, (chains[place] for place in order)

    def _read(self, number: int) -> np.ndarray:
        chunk = self.chunks[number]
        source = self.sources[chunk.source]
        return read_frames(source.source, source.pts, source.keys, chunk_frames(source, chunk), self.size, self.decoder)


def read_pairs(
    sources: list[IndexedSource], size: int, count: int, batch: int, decoder: str = "av"
) -> list[tuple[Tensor, Tensor]]:
    """Held-out pairs, spread evenly over all of them: always the same.

    Returns:
        At most `count` pairs in batches (I_t, I_{t+C}), [b, 3, size, size] uint8 each, b <= `batch`.
    """
    every = [(source, t) for source in sources for t in np.flatnonzero(source.held_out).tolist()]
    pairs = []
    for place in np.unique(np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)):
        source, start = every[place]
        numbers = np.array([start, source.future[start]])
        frames = read_frames(source.source, source.pts, source.keys, numbers, size, decoder)
        pairs.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
    batches = [torch.stack(pairs[first : first + batch]) for first in range(0, len(pairs), batch)]
    return [(stacked[:, 0].contiguous(), stacked[:, 1].contiguous()) for stacked in batches]
