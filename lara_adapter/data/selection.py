"""Which pairs of a source are of use, which of its episodes are damaged, and what is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import LaraArgumentError
from .gap import Gap
from .scan import Scan, find_cuts, thin_out
from .sources import Segment, Source

__all__ = [
    "Candidate",
    "IndexSettings",
    "IndexedSource",
    "divide",
    "groups_of",
    "hold_out",
    "rank_groups",
    "select_pairs",
]


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


class Candidate(NamedTuple):
    """A source before it is known what is held out; the first four fields are as in :class:`IndexedSource`."""

    source: Source
    pts: np.ndarray
    keys: np.ndarray
    future: np.ndarray
    kept: np.ndarray  # [T] bool, whether the pair that starts here is of use
    part: np.ndarray  # [T] int32, place of the episode among the source's; -1: of none, or of a damaged one


def select_pairs(
    source: Source, scan: Scan, settings: IndexSettings
) -> tuple[Candidate, dict[str, int], list[Segment]]:
    """Find the pairs of a source that are of use.

    Returns:
        The pairs; counts of frames, cuts and still pairs; the damaged episodes, none of whose pairs is of use.
    """
    total = len(scan.pts)
    cuts = find_cuts(scan.change, settings.cut_threshold)
    part, damaged = _episodes(source, scan)
    shot = np.cumsum(cuts | scan.broken)
    other = np.maximum(scan.future, 0)
    usable = (scan.future >= 0) & (part >= 0) & (shot[other] == shot) & (part[other] == part)
    still = usable & (scan.motion < settings.still_threshold)
    few = thin_out(still, settings.still_keep)
    candidate = Candidate(source, scan.pts, np.flatnonzero(scan.key).astype(np.int32), scan.future, usable & few, part)
    counts = {
        "frames": total, "cuts": int(cuts.sum()), "still_pairs": int(still.sum()),
        "still_pairs_left_out": int((still & ~few).sum()),
    }  # fmt: skip
    return candidate, counts, damaged


def _episodes(source: Source, scan: Scan) -> tuple[np.ndarray, list[Segment]]:
    """The episode of each frame, as in :class:`Candidate`, and the damaged ones."""
    total, seconds = len(scan.pts), scan.seconds
    if not source.segments:
        return np.zeros(total, np.int32), []
    part = np.full(total, -1, np.int32)
    damaged = []
    tick = float(np.median(np.diff(seconds))) if total > 1 else 0.0
    rising = bool((np.diff(seconds) >= 0).all())
    for place, segment in enumerate(source.segments):
        # half a frame of tolerance: the table and the file round differently
        start, stop = segment.start - tick / 2, segment.stop - tick / 2
        if rising:
            member = np.arange(*np.searchsorted(seconds, [start, stop]))
        else:  # some frames have no time
            member = np.flatnonzero((seconds >= start) & (seconds < stop))
        # the first one may follow the damage of the episode before
        if len(member) < segment.length or scan.broken[member][1:].any():
            damaged.append(segment)
        else:
            part[member] = place
    return part, damaged


def divide(candidate: Candidate, settings: IndexSettings, held: Collection[str]) -> IndexedSource:
    """Divide the pairs of a source into those to train on and those that are held out.

    Args:
        candidate: the pairs.
        settings: what counts as one.
        held: the groups that are held out, of the whole collection; none, though some should be: it is a single video.
    """
    total, kept = len(candidate.pts), candidate.kept
    flags = np.array([*(group in held for group in groups_of(candidate.source)), False])  # the last: of part -1
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


def groups_of(source: Source) -> Sequence[str]:
    """What is held out together, for each episode of a source; a source without episodes is a group of its own."""
    return [segment.group for segment in source.segments] or [str(source.path)]


def rank_groups(names: Collection[str], settings: IndexSettings) -> list[tuple[int, str]]:
    """Groups with a number in [0, 2^64) drawn from the name, in its order."""

    def draw(group: str) -> int:
        # relative to the folder it is in: a collection that was moved holds out the same
        name = f"{settings.seed}/{'/'.join(Path(group).parts[-2:])}"
        return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")

    return sorted((draw(group), group) for group in names)


def hold_out(ranked: Sequence[tuple[int, str]], settings: IndexSettings) -> frozenset[str]:
    """Groups that are held out; chosen by a hash of the name, so that a new video changes nothing for the others.

    Args:
        ranked: :func:`rank_groups` of all of them.
        settings: which share.
    """
    if len(ranked) < 2 or not settings.held_out:
        return frozenset()
    chosen = {group for number, group in ranked if number < settings.held_out * 2**64}
    return frozenset(chosen or {ranked[0][1]}) - {ranked[-1][1]}
