"""A collection too large to be looked at before the first step: it is indexed in stretches, ahead of the training.

The sources of an epoch are permuted, dealt to the processes and divided into stretches of about as many frames, by what
is known without opening them. The chunks of a stretch are permuted, and while it is trained on the next one is scanned.
Each process scans what it trains on itself and shares the scans through the folder of the index: there is nothing to
agree on. The first stretches are short, so that the first step comes soon.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import LaraArgumentError
from .chunks import CHUNK
from .faults import require_pairs, warn_of
from .index import COUNTS
from .indexed import IndexedSources, Summary, summarize
from .journal import Entry, Journal
from .order import Window, split_windows
from .packed import PackedSources
from .selection import IndexedSource, IndexSettings, groups_of, hold_out, rank_groups
from .sources import Source
from .workers import Workers

__all__ = ["AheadIndex"]

_FIRST, _LONGEST = 8_000, 256_000  # frames of the first stretch of a run; the next ones have twice as many, up to this
_BYTES = 5000  # of a frame, to guess how many frames a file has of which no dataset says it
_SHORTEST, _UNKNOWN = 100, 1000  # frames that a file is guessed to have at least, and where nothing is known
_MEASURED = 4  # held-out pairs to choose from, for each that is measured on
_TRIED = 64  # held-out sources that are looked at for that


class _Stretch(NamedTuple):
    epoch: int
    number: int
    sources: np.ndarray  # [n] int32, numbers


class AheadIndex:
    """The sources, and the order in which one process reads them: see :class:`~lara_adapter.data.order.Order`.

    Args:
        sources: where to find pairs; the same in every process.
        settings: what counts as one.
        folder: of the scans.
        seed: of the order.
        rank: number of this process.
        ranks: how many there are.
        shuffle_frames: frames that are shuffled over.
        workers: threads that scan.

    Attributes:
        sources: all of them, [n]; which pairs one has is known when it was scanned.

    Raises:
        LaraArgumentError: fewer sources than processes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: IndexSettings,
        folder: str | os.PathLike[str],
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        shuffle_frames: int = 4096,
        workers: int = 2,
    ) -> None:
        self.settings, self.folder, self.seed, self.rank, self.ranks = settings, Path(folder), seed, rank, ranks
        self.shuffle_frames = shuffle_frames
        self.folder.mkdir(parents=True, exist_ok=True)
        packed = self._packed = sources if isinstance(sources, PackedSources) else PackedSources(sources)
        digest = hashlib.sha256(repr((settings, seed, _FIRST, _LONGEST, _UNKNOWN)).encode())
        groups: dict[str, int] = {}
        own: list[int] = []  # groups of each source, one after the other
        begins: list[int] = []
        for source in packed:
            digest.update(repr((str(source.path), source.column, source.inside, source.segments)).encode())
            begins.append(len(own))
            own += [groups.setdefault(group, len(groups)) for group in groups_of(source)]
        ranked = rank_groups(groups, settings)
        self.held = hold_out(ranked, settings)
        places = np.zeros(len(groups), np.int64)
        places[[groups[group] for _, group in ranked]] = np.arange(len(ranked))
        held = np.array([group in self.held for group in groups], bool)[own]
        # of a single episode the end is held out
        alone = not self.held and settings.held_out > 0
        self._trained = np.flatnonzero(~np.logical_and.reduceat(held, begins)).astype(np.int32)
        nearest = np.minimum.reduceat(np.where(held | alone, places[own], len(places)), begins)
        measured = np.argsort(nearest, kind="stable")[:_TRIED]
        self._measured = measured[nearest[measured] < len(places)]
        if len(self._trained) < ranks:
            raise LaraArgumentError(f"{len(self._trained)} videos for {ranks} processes: use fewer processes")
        self._lengths = packed.lengths()
        self.journal = Journal(self.folder, digest.hexdigest()[:16], rank, ranks)
        self.sources = IndexedSources(
            packed, settings, self.folder, held=self.held, numbers=np.arange(len(packed), dtype=np.int32),
            keys=np.zeros(len(packed), "S32"), chunks=np.array([], CHUNK), held_out_pairs=np.zeros(len(packed), np.int64),
        )  # fmt: skip
        self._workers = Workers(workers, "index")
        self._warned: set[tuple[str, str]] = set()

    def close(self) -> None:
        """Scan no more than what was begun."""
        self._workers.close()

    def report(self) -> dict[str, Any]:
        """The report of :class:`~lara_adapter.data.index.VideoIndex` as far as it is known; "scanned" says how far."""
        return self.journal.report(len(self._packed), COUNTS)

    def begin(self) -> None:
        """Forget what was found so far: another run begins, in which what could not be read is tried again."""
        self.journal.clear()

    def held_out(self, pairs: int) -> list[IndexedSource]:
        """A few held-out sources, always the same, with several times that many pairs if they can be found soon."""
        found: list[Summary] = []
        usable: list[IndexedSource] = []
        waiting: deque[Future[Summary]] = deque()
        numbers = iter(self._measured.tolist())
        total = 0
        while total < _MEASURED * pairs:
            # one is scanned while one is looked at
            waiting.extend(self._scan(number) for number in itertools.islice(numbers, 2 - len(waiting)))
            if not waiting:
                break
            found.append(waiting.popleft().result())
            total += found[-1].held_out_pairs
            if found[-1].held_out_pairs:
                usable.append(self.sources[found[-1].number])
        for scan in waiting:
            scan.cancel()
        # the others are met again in a stretch
        trained = set(self._trained.tolist())
        self._note(0, -1, [summary for summary in found if summary.number not in trained])
        return usable

    def windows(self, skip: int) -> Iterator[tuple[Window, int]]:
        """See :class:`~lara_adapter.data.order.Order`.

        Raises:
            LaraArgumentError, DatasetError: a whole epoch has no pair.
        """
        waiting: deque[tuple[_Stretch, list[Future[Summary]]]] = deque()
        fruitful = -1  # the last epoch with a pair
        for stretch in self._plan():
            entry = self.journal.get(stretch.epoch, stretch.number)
            if entry is not None and not waiting and skip >= entry.pairs:
                skip -= entry.pairs
                fruitful = stretch.epoch if entry.pairs else fruitful
                continue
            without = [] if entry is None else entry.without
            waiting.append((stretch, [self._scan(n) for n in stretch.sources.tolist() if n not in without]))
            if len(waiting) > 1:  # the next one is being scanned
                stretch, scans = waiting.popleft()
                summaries = [scan.result() for scan in scans]
                self._note(stretch.epoch, stretch.number, summaries)
                for summary in summaries:
                    self.sources.keys[summary.number] = summary.key.encode()
                chunks = np.concatenate([np.array([], CHUNK), *(summary.chunks for summary in summaries)])
                if len(chunks):
                    fruitful = stretch.epoch
                elif stretch.epoch - fruitful > 1:
                    require_pairs(self.report() | {"pairs": 0})
                skip = yield from self._shuffled(stretch, chunks, skip)

    def _scan(self, number: int) -> Future[Summary]:
        return self._workers.submit(
            lambda: summarize(number, self._packed[number], self.settings, self.folder, self.held)
        )

    def _plan(self) -> Iterator[_Stretch]:
        """The stretches of this process, epoch after epoch."""
        for epoch in itertools.count():
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._trained))
            mine = self._trained[order[self.rank :: self.ranks]]
            first, most = 0, _FIRST if epoch == 0 else _LONGEST
            for number in itertools.count():
                last, frames = first, 0
                entry = self.journal.get(epoch, number)
                if entry is not None:
                    last += entry.sources
                while entry is None and last < len(mine) and frames < most:
                    frames += self._frames(int(mine[last]))
                    last += 1
                yield _Stretch(epoch, number, mine[first:last])
                if last >= len(mine):
                    break
                first, most = last, min(2 * most, _LONGEST)

    def _frames(self, number: int) -> int:
        """How many frames a source has, guessed where no dataset says it."""
        source = self._packed[number]
        if self._lengths[number] or source.kind != "video":
            return int(self._lengths[number]) or _UNKNOWN
        try:
            return max(_SHORTEST, source.path.stat().st_size // _BYTES)
        except OSError:
            return _UNKNOWN

    def _note(self, epoch: int, stretch: int, summaries: Sequence[Summary]) -> None:
        """Warn of what is wrong in a stretch, and note what was found if that was not done in an earlier run."""
        faults = [fault for summary in summaries for fault in summary.faults]
        new = [fault for fault in faults if (fault["file"], fault["what"]) not in self._warned]
        self._warned.update((fault["file"], fault["what"]) for fault in new)
        warn_of(new, len(summaries))
        if self.journal.get(epoch, stretch) is not None:
            return
        counts = {name: sum(summary.counts.get(name, 0) for summary in summaries) for name in COUNTS}
        pairs = sum(int(summary.chunks["pairs"].sum()) for summary in summaries)
        counts |= {"pairs": pairs, "held_out_pairs": sum(summary.held_out_pairs for summary in summaries)}
        usable = sum(len(summary.chunks) > 0 or summary.held_out_pairs > 0 for summary in summaries)
        without = [summary.number for summary in summaries if not summary.scanned]
        turned = dict(Counter(summary.turned for summary in summaries if summary.turned))
        self.journal.add(Entry(epoch, stretch, len(summaries), usable, pairs, counts, faults, without, turned))

    def _shuffled(self, stretch: _Stretch, chunks: np.ndarray, skip: int) -> Generator[tuple[Window, int], None, int]:
        """The windows of a stretch; returns how many pairs are still to be passed over."""
        seed = [self.seed, stretch.epoch, stretch.number, self.rank]
        permuted = chunks[np.random.default_rng(seed).permutation(len(chunks))]
        for number, window in enumerate(split_windows(permuted, self.shuffle_frames) if len(chunks) else []):
            pairs = int(window["pairs"].sum())
            if skip < pairs:
                yield Window(stretch.epoch, [*seed, 1 + number], window), skip
            skip = max(0, skip - pairs)
        return skip
