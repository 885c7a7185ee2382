"""The index of a collection of video: every frame is decoded once, the result kept in a folder and used again."""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .chunks import CHUNK
from .faults import Fault, require_pairs, unreadable, warn_of
from .gap import Gap
from .indexed import IndexedSources, Summary, no_pair, summarize
from .packed import PackedSources
from .scan_cache import has_scan, load_scan, scan_key
from .selection import IndexedSource, IndexSettings, groups_of, hold_out, rank_groups
from .sources import Source

__all__ = ["COUNTS", "IndexSettings", "IndexedSource", "VideoIndex", "build_index", "require_pairs", "scan_sources"]

logger = logging.getLogger(__name__)

COUNTS = ("frames", "pairs", "held_out_pairs", "cuts", "still_pairs", "still_pairs_left_out")


class VideoIndex(NamedTuple):
    """All usable sources."""

    sources: IndexedSources  # of :class:`IndexedSource`, in the order in which they were given
    report: dict[str, Any]  # JSON-able counts, and what was left out, and why


class Scanned(NamedTuple):
    """What came of scanning a source."""

    frames: int  # decoded now; 0 if it was scanned before, or cannot be
    fault: Fault | None = None  # why it cannot be


def scan_sources(
    sources: Sequence[Source], gap: Gap, folder: str | os.PathLike[str], workers: int = 2
) -> Iterator[Scanned]:
    """Decode, in `workers` threads, every source that was not scanned before; each process may scan a share.

    One file per source is written to `folder`, which any number of runs may share. A source that was changed (by size or
    time), or is scanned with another gap, is scanned again.

    Yields:
        What came of each source in turn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def scan(source: Source) -> Scanned:
        key = scan_key(source, gap)
        if has_scan(folder, key):
            return Scanned(0)
        found, frames = load_scan(source, gap, folder, key)
        return Scanned(frames, unreadable(source, found) if isinstance(found, str) else None)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        yield from pool.map(scan, sources)


def build_index(
    sources: Sequence[Source], settings: IndexSettings, folder: str | os.PathLike[str], *, log: bool = True
) -> VideoIndex:
    """Find the pairs of every source; the result may hold no pair: see :func:`require_pairs`.

    A damaged episode is left out, the others of its file are used. What there is to know of each frame is not held in
    memory but read from the scans, when :attr:`VideoIndex.sources` is asked for a source.

    Args:
        sources: where to find them.
        settings: what counts as a pair.
        folder: of the scans; :func:`scan_sources` makes them in parallel, and what is missing is scanned here.
        log: warn about damaged sources.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed = sources if isinstance(sources, PackedSources) else PackedSources(sources)
    found = _Found(dict.fromkeys(COUNTS, 0), [])
    groups: dict[str, int] = {}  # of which there are pairs: what has none cannot be measured on
    for number, source in enumerate(packed):
        summary = summarize(number, source, settings, folder)
        names = groups_of(source)
        found.add(summary, [groups.setdefault(names[place], len(groups)) for place in summary.episodes.tolist()])
    held = hold_out(rank_groups(groups, settings), settings)
    if not held and settings.held_out:  # a single video, whose end is held out
        found = _hold_out_ends(found, packed, settings, folder)
    indexed = found.indexed(np.array([group in held for group in groups], bool), packed, settings, folder, held)
    counts = found.counts | {
        "pairs": int(indexed.chunks["pairs"].sum()), "held_out_pairs": int(indexed.held_out_pairs.sum())
    }  # fmt: skip
    turned = {"turned": dict(found.turned)} if found.turned else {}
    report = {"sources": len(packed), "usable": len(indexed), **counts, **turned, "faults": found.faults}
    if log:
        if report["pairs"]:  # without any, the error of require_pairs says what is wrong
            warn_of(found.faults, len(packed))
        if found.slow:
            logger.warning(
                "%d videos have key frames more than 600 frames apart: reading from their middle is slow", found.slow
            )
    return VideoIndex(indexed, report)


class _Found:
    """The summaries of the sources that have pairs, as they come in; a few bytes for each chunk."""

    def __init__(self, counts: dict[str, int], faults: list[Fault]) -> None:
        self.counts, self.faults, self.slow = counts, faults, 0
        self.turned: Counter[str] = Counter()  # sources that their files say to turn, by how
        self._chunks = bytearray()
        self._groups = array("i")  # of each chunk
        self._numbers = array("i")
        self._keys = bytearray()
        self._held_out_pairs = array("q")

    def add(self, summary: Summary, groups: Sequence[int]) -> None:
        """Add one, with the number of the group of each of its chunks."""
        self.faults += summary.faults
        for name, value in summary.counts.items():
            self.counts[name] += value
        if not len(summary.chunks) and not summary.held_out_pairs:
            return
        self.slow += summary.slow
        self.turned.update([summary.turned] if summary.turned else [])
        self._chunks += summary.chunks.tobytes()
        self._groups.extend(groups)
        self._numbers.append(summary.number)
        self._keys += summary.key.encode()
        self._held_out_pairs.append(summary.held_out_pairs)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def indexed(
        self,
        held_groups: np.ndarray,
        sources: PackedSources,
        settings: IndexSettings,
        folder: Path,
        held: Collection[str],
    ) -> IndexedSources:
        """The sources, without the chunks of groups that are held out: `held_groups`, [G] bool."""
        numbers, chunks = np.array(self._numbers), np.frombuffer(self._chunks, CHUNK)
        chunks["source"] = np.searchsorted(numbers, chunks["source"])  # sources without pairs have no number
        flags = held_groups[np.array(self._groups, np.int32)]
        held_out = np.array(self._held_out_pairs)
        np.add.at(held_out, chunks["source"][flags], chunks["pairs"][flags])
        keys = np.frombuffer(self._keys, "S32")
        return IndexedSources(
            sources,
            settings,
            folder,
            held=held,
            numbers=numbers,
            keys=keys,
            chunks=chunks[~flags],
            held_out_pairs=held_out,
        )


def _hold_out_ends(found: _Found, sources: PackedSources, settings: IndexSettings, folder: Path) -> _Found:
    """Of the only episode the end is held out: what was found is divided anew."""
    divided = _Found(found.counts, found.faults)
    for number in found:
        summary = summarize(number, sources[number], settings, folder, ())
        if not len(summary.chunks) and not summary.held_out_pairs:
            divided.faults.append(no_pair(sources[number], summary.counts["frames"]))
        divided.add(summary._replace(counts={}, faults=[]), [0] * len(summary.chunks))
    return divided
