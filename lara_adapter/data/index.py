"""The index of a collection of video: every frame is decoded once, the result kept in a folder and used again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DatasetError, LaraArgumentError
from .gap import Gap
from .scan import Scan, find_cuts, thin_out
from .scan_cache import load_scan
from .sources import Segment, Source

__all__ = ["IndexSettings", "IndexedSource", "VideoIndex", "build_index", "require_pairs", "scan_sources"]

logger = logging.getLogger(__name__)

_REFUSED = "refused"  # in the report: an episode of a dataset, see `require_pairs`


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What counts as a pair.

    Attributes:
        gap: how far apart the two frames are.
        cut_threshold: mean change of a pixel from one frame to the next, [0, 1], from which on it may be a cut; 0: no cuts.
        still_threshold: a pair whose most moving pixels change by less, [0, 1], is still.
        still_keep: share of the still pairs that is kept, [0, 1].
        held_out: share of the episodes that is not trained on, (0, 1).
        seed: which ones.
    """

    gap: Gap = Gap(frames=5)  # noqa: RUF009  (a tuple: it cannot be changed)
    cut_threshold: float = 0.08
    still_threshold: float = 0.02
    still_keep: float = 0.1
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if None not in self.gap or not (self.gap.frames or self.gap.seconds or 0) > 0:
            raise LaraArgumentError(f"gap={tuple(self.gap)}, but either frames >= 1 or seconds > 0 is expected")
        for name in ("cut_threshold", "still_threshold", "still_keep", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise LaraArgumentError(f"{name}={getattr(self, name)}, but a number in [0, 1] is expected")


class IndexedSource(NamedTuple):
    """What training needs to know of a source."""

    source: Source  # where the frames are
    pts: np.ndarray  # [T] int64, as in :class:`~lara_adapter.data.scan.Scan`
    keys: np.ndarray  # [K] int32, numbers of the frames at which decoding can start
    future: np.ndarray  # [T] int32, the other frame of each pair
    train: np.ndarray  # [T] bool, whether the pair that starts here is trained on
    held_out: np.ndarray  # [T] bool, whether it is held out
    parts: np.ndarray  # [P + 1] int32, where its episodes begin, and T


class VideoIndex(NamedTuple):
    """All usable sources."""

    sources: list[IndexedSource]  # in the order in which they were given
    report: dict[str, Any]  # JSON-able counts, and what was left out, and why


def scan_sources(
    sources: Sequence[Source], gap: Gap, folder: str | os.PathLike[str], workers: int = 2
) -> Iterator[int]:
    """Decode, in `workers` threads, every source that was not scanned before; each process may scan a share.

    One file per source is written to `folder`, which any number of runs may share. A source that was changed (by size or
    time), or is scanned with another gap, is scanned again.

    Yields:
        How many frames were decoded now, for each source in turn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        yield from pool.map(lambda source: load_scan(source, gap, folder)[1], sources)


def build_index(
    sources: Sequence[Source], settings: IndexSettings, folder: str | os.PathLike[str], *, log: bool = True
) -> VideoIndex:
    """Find the pairs of every source; the result may hold no pair, or damaged episodes: see :func:`require_pairs`.

    Args:
        sources: where to find them.
        settings: what counts as a pair.
        folder: of the scans; :func:`scan_sources` makes them in parallel, and what is missing is scanned here.
        log: warn about damaged sources.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    candidates: list[_Candidate] = []
    counts = dict.fromkeys(("frames", "pairs", "held_out_pairs", "cuts", "still_pairs", "still_pairs_left_out"), 0)
    faults: list[dict[str, str]] = []
    slow = 0
    for source in sources:
        scan, _ = load_scan(source, settings.gap, folder)
        if isinstance(scan, str):
            faults.append(_damaged(source, source.segments, scan) if source.segments else _fault(source, scan, "no"))
            continue
        candidate, numbers, broken = _select_pairs(source, scan, settings)
        if broken:
            reason = scan.note or "frames are missing or cannot be decoded"
            faults.append(_damaged(source, broken, reason))
        elif scan.note:
            faults.append(_fault(source, scan.note, "the rest"))
        for name, number in numbers.items():
            counts[name] += number
        if not candidate.kept.any():
            faults.append(_without_pair(candidate))
            continue
        slow += int(np.diff(np.append(np.flatnonzero(scan.key), len(scan.key))).max(initial=0) > 600)
        candidates.append(candidate)
    # only now: what gives no pair cannot be measured on
    held = _held_out({group for candidate in candidates for group in candidate.groups()}, settings)
    indexed = []
    for candidate in candidates:
        divided = _divide(candidate, settings, held)
        if not divided.train.any() and not divided.held_out.any():
            faults.append(_without_pair(candidate))
            continue
        counts["pairs"] += int(divided.train.sum())
        counts["held_out_pairs"] += int(divided.held_out.sum())
        indexed.append(divided)
    report = {"sources": len(sources), "usable": len(indexed), **counts, "faults": faults}
    if log:
        _warn(report, slow)
    return VideoIndex(indexed, report)


def require_pairs(report: dict[str, Any]) -> None:
    """Refuse a collection without a pair to train on, or with a damaged LeRobot dataset.

    Raises:
        DatasetError: episodes of a dataset are damaged; it names the first ones.
        LaraArgumentError: there is no pair; it names what is wrong with the first sources.
    """
    damaged = [fault for fault in report["faults"] if fault["used"] == _REFUSED]
    if damaged:
        raise DatasetError(
            f"{_first(damaged)}. A LeRobot dataset is read whole or not at all: fetch its files again, or delete these "
            f"episodes from it ({len(damaged)} files are concerned)"
        )
    if not report["pairs"]:
        raise LaraArgumentError(
            f"no usable video among {report['sources']} sources ({_first(report['faults']) or 'nothing was found'}). "
            "Expected: video files, folders of pictures or LeRobot datasets, with more frames than the gap"
        )


def _first(faults: list[dict[str, str]]) -> str:
    return "; ".join(f"{fault['file']}: {fault['what']}" for fault in faults[:3])


def _fault(source: Source, what: str, used: str) -> dict[str, str]:
    return {"file": str(source.path), "what": what, "used": used}


def _damaged(source: Source, segments: Sequence[Segment], reason: str) -> dict[str, str]:
    names = ", ".join(str(segment.episode) for segment in segments[:5]) + (", ..." if len(segments) > 5 else "")
    many = len(segments) > 1
    return _fault(source, f"episode{'s' * many} {names} {'are' if many else 'is'} damaged: {reason}", _REFUSED)


def _warn(report: dict[str, Any], slow: int) -> None:
    faults = report["faults"]
    if faults:
        logger.warning(
            "%d of %d sources are damaged or give no pair: %s", len(faults), report["sources"], _first(faults)
        )
    if slow:
        logger.warning("%d videos have key frames more than 600 frames apart: reading from their middle is slow", slow)


def _held_out(names: set[str], settings: IndexSettings) -> set[str]:
    """Groups that are held out; chosen by a hash of the name, so that a new video changes nothing for the others."""
    groups = sorted(names)

    def draw(group: str) -> int:
        # relative to the folder it is in: a collection that was moved holds out the same
        name = f"{settings.seed}/{'/'.join(Path(group).parts[-2:])}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    if len(groups) < 2 or not settings.held_out:
        return set()
    ranked = sorted(groups, key=lambda group: (draw(group), group))
    chosen = {group for group in groups if draw(group) < settings.held_out * 2**64}
    return (chosen or {ranked[0]}) - {ranked[-1]}


def _groups(source: Source) -> list[str]:
    return [segment.group for segment in source.segments] or [str(source.path)]


class _Candidate(NamedTuple):
    """A source before it is known what is held out; the first four fields are as in :class:`IndexedSource`."""

    source: Source
    pts: np.ndarray
    keys: np.ndarray
    future: np.ndarray
    kept: np.ndarray  # [T] bool, whether the pair that starts here is of use
    part: np.ndarray  # [T] int32, number of the episode; -1: of none

    def groups(self) -> set[str]:
        """The groups that have pairs."""
        names = _groups(self.source)
        return {names[number] for number in np.unique(self.part[self.kept]).tolist()}


def _without_pair(candidate: _Candidate) -> dict[str, str]:
    return _fault(candidate.source, f"no pair of frames in {len(candidate.pts)} frames", "no")


def _select_pairs(
    source: Source, scan: Scan, settings: IndexSettings
) -> tuple[_Candidate, dict[str, int], list[Segment]]:
    """Which pairs of a source are of use; counts; and its damaged episodes."""
    total = len(scan.pts)
    damaged = []
    cuts = find_cuts(scan.change, settings.cut_threshold)
    part = np.zeros(total, np.int32)
    if source.segments:
        part[:] = -1
        tick = float(np.median(np.diff(scan.seconds))) if total > 1 else 0.0
        for number, segment in enumerate(source.segments):
            # half a frame of tolerance: the table and the file round differently
            member = (scan.seconds >= segment.start - tick / 2) & (scan.seconds < segment.stop - tick / 2)
            part[member] = number
            # the first one may follow the damage of the episode before
            if member.sum() < segment.length or scan.broken[member][1:].any():
                damaged.append(segment)
    shot = np.cumsum(cuts | scan.broken)
    other = np.maximum(scan.future, 0)
    usable = (scan.future >= 0) & (part >= 0) & (shot[other] == shot) & (part[other] == part)
    still = usable & (scan.motion < settings.still_threshold)
    few = thin_out(still, settings.still_keep)
    candidate = _Candidate(source, scan.pts, np.flatnonzero(scan.key).astype(np.int32), scan.future, usable & few, part)
    counts = {
        "frames": total, "cuts": int(cuts.sum()), "still_pairs": int(still.sum()),
        "still_pairs_left_out": int((still & ~few).sum()),
    }  # fmt: skip
    return candidate, counts, damaged


def _divide(candidate: _Candidate, settings: IndexSettings, held: set[str]) -> IndexedSource:
    """Divide the pairs of a source into those to train on and those that are held out."""
    total, kept = len(candidate.pts), candidate.kept
    flags = np.array([*(group in held for group in _groups(candidate.source)), False])  # the last is that of part -1
    held_frames = flags[candidate.part]
    if not held and settings.held_out:
        # a single video: its last stretch is held out, and no trained pair reaches into it
        border = int(total * (1 - settings.held_out))
        held_frames = np.arange(total) >= border
        kept = kept & (held_frames[np.maximum(candidate.future, 0)] == held_frames)
    parts = np.flatnonzero(np.diff(candidate.part, prepend=-2))
    return IndexedSource(
        candidate.source, candidate.pts, candidate.keys, candidate.future, kept & ~held_frames, kept & held_frames,
        np.append(parts, total).astype(np.int32),
    )  # fmt: skip
