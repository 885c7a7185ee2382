"""Sources whose pairs are known, held as little as possible: what there is to know of each frame stays on disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from ..errors import DatasetError
from .chunks import CHUNK, split_chunks
from .faults import Fault, damaged_episodes, fault, unreadable
from .scan import Scan
from .scan_cache import load_scan, read_scan, scan_key
from .selection import Candidate, IndexedSource, IndexSettings, divide, select_pairs
from .sources import Source, shown

__all__ = ["IndexedSources", "Summary", "no_pair", "summarize"]

_CACHE = 32 * 2**20  # bytes of the sources that are kept loaded


class Summary(NamedTuple):
    """All that is kept of a source that was scanned."""

    number: int  # of the source
    key: str  # under which its scan is kept
    chunks: np.ndarray  # [c] of CHUNK
    episodes: np.ndarray  # [c] int32, place of the episode of each among those of the source
    counts: dict[str, int]  # frames, cuts, still pairs, ...
    faults: list[Fault]
    scanned: bool  # whether there is a scan
    held_out_pairs: int  # 0 where it was not given what is held out
    slow: bool  # whether reading from its middle is
    turned: str = ""  # as in :class:`~lara_adapter.data.scan.Scan`


def summarize(
    number: int, source: Source, settings: IndexSettings, folder: Path, held: Collection[str] | None = None
) -> Summary:
    """Scan a source, if that was not done before, and say which chunks it gives.

    Args:
        number: of the source.
        source: what to scan.
        settings: what counts as a pair.
        folder: of the scans.
        held: the groups that are held out, as for :func:`~lara_adapter.data.selection.divide`; None: not known yet, all
            chunks are given.
    """
    key = scan_key(source, settings.gap)
    scan, _ = load_scan(source, settings.gap, folder, key)
    nothing = np.array([], CHUNK)
    if isinstance(scan, str):
        return Summary(number, key, nothing, nothing["source"], {}, [unreadable(source, scan)], False, 0, False)
    candidate, counts, damaged = select_pairs(source, scan, settings)
    faults = []
    if damaged:
        faults.append(damaged_episodes(source, damaged, scan.note or "frames are missing or cannot be decoded"))
    elif scan.note:
        faults.append(fault(source, scan.note, "the rest"))
    if not candidate.kept.any() and not damaged:
        faults.append(no_pair(source, len(scan.pts)))
    divided = _undivided(candidate) if held is None else divide(candidate, settings, held)
    chunks = split_chunks([divided], number)
    slow = int(np.diff(np.append(candidate.keys, len(scan.pts))).max(initial=0)) > 600
    return Summary(number, key, chunks, candidate.part[chunks["first"]], counts, faults, True,
                   int(divided.held_out.sum()), slow, scan.turned)  # fmt: skip


def _undivided(candidate: Candidate) -> IndexedSource:
    """Everything is trained on. Chunks do not reach over episodes, so that those of the others are not changed by one."""
    parts = np.append(np.flatnonzero(np.diff(candidate.part, prepend=-2)), len(candidate.pts)).astype(np.int32)
    source, pts, keys, future, kept, _ = candidate
    return IndexedSource(source, pts, keys, future, kept, np.zeros_like(kept), parts)


def no_pair(source: Source, frames: int) -> Fault:
    """The entry of a source without a pair."""
    return fault(source, f"no pair of frames in {frames} frames", "no")


class IndexedSources(Sequence[IndexedSource]):
    """Sources that are read from their scans when they are asked for; the last few megabytes stay loaded.

    Args:
        sources: all sources.
        settings: what counts as a pair.
        folder: of the scans.
        held: the groups that are held out, of the whole collection.
        numbers: [n] int, which of the sources these are.
        keys: [n] S32, under which their scans are kept; empty where that is not known yet.
        chunks: [C] of CHUNK, `source` counting within `numbers`; empty: not all are known.
        held_out_pairs: [n] int, of each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: IndexSettings,
        folder: Path,
        *,
        held: Collection[str],
        numbers: np.ndarray,
        keys: np.ndarray,
        chunks: np.ndarray,
        held_out_pairs: np.ndarray,
    ) -> None:
        self._sources, self._settings, self._folder, self._held = sources, settings, folder, held
        self._numbers, self.keys, self.chunks, self.held_out_pairs = numbers, keys, chunks, held_out_pairs
        self._loaded: OrderedDict[int, IndexedSource] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        """The keyword arguments that make this in another process."""
        return {
            "held": self._held, "numbers": self._numbers, "keys": self.keys, "chunks": self.chunks,
            "held_out_pairs": self.held_out_pairs,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> IndexedSource: ...

    @overload
    def __getitem__(self, number: slice) -> list[IndexedSource]: ...

    def __getitem__(self, number: int | slice) -> IndexedSource | list[IndexedSource]:
        """A source; any thread may ask.

        Raises:
            DatasetError: its scan is gone, and the source is not what it was.
        """
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        number = range(len(self))[number]
        with self._lock:
            if number in self._loaded:
                self._loaded.move_to_end(number)
                return self._loaded[number]
        source = self._sources[self._numbers[number]]
        candidate, _, _ = select_pairs(source, self._scan(number, source), self._settings)
        indexed = divide(candidate, self._settings, self._held)
        with self._lock:
            if number not in self._loaded:
                self._loaded[number] = indexed
                self._bytes += _size(indexed)
            while self._bytes > _CACHE and len(self._loaded) > 1:
                self._bytes -= _size(self._loaded.popitem(last=False)[1])
        return indexed

    def _scan(self, number: int, source: Source) -> Scan:
        key = self.keys[number].decode()
        kept = read_scan(self._folder, key) if key else None
        if kept is None:  # the folder was cleaned up, or it is a disk that not all machines see
            key_now = scan_key(source, self._settings.gap)
            scan, _ = load_scan(source, self._settings.gap, self._folder, key_now)
            if isinstance(scan, str) or key not in ("", key_now):
                reason = scan if isinstance(scan, str) else "it was changed"
                raise DatasetError(f"{shown(source.path)} is not what it was when it was indexed: {reason}")
            kept = scan
        return kept


def _size(indexed: IndexedSource) -> int:
    return sum(array.nbytes for array in indexed[1:]) + 2000
