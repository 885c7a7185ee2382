"""The index of a collection of video: every frame looked at once, the result kept in a folder and used again."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import LaraArgumentError
from .cuts import Scan, cuts_of, thinned
from .gap import Gap
from .seen import seen
from .sources import Source

__all__ = ["IndexSettings", "VideoIndex", "build_index", "require_pairs"]

logger = logging.getLogger(__name__)


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


class Clip(NamedTuple):
    """What training needs to know of a source.

    source: where the frames are.
    pts: [T] int64, as in :class:`Scan`.
    keys: [K] int32, numbers of the frames at which decoding can start.
    future: [T] int32, the other frame of each pair.
    train: [T] bool, whether the pair that starts here is trained on.
    held_out: [T] bool, whether it is held out.
    parts: [P + 1] int32, where its episodes begin, and T.
    """

    source: Source
    pts: np.ndarray
    keys: np.ndarray
    future: np.ndarray
    train: np.ndarray
    held_out: np.ndarray
    parts: np.ndarray


class VideoIndex(NamedTuple):
    """All usable sources, and what was found.

    clips: one for each usable source, in the order given.
    report: JSON-able counts, and what was left out, and why.
    """

    clips: list[Clip]
    report: dict[str, Any]


def build_index(
    sources: Sequence[Source],
    settings: IndexSettings,
    folder: str | os.PathLike[str],
    *,
    workers: int = 2,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> VideoIndex:
    """Look at every source once, each process at its share, and read what has been seen before from `folder`.

    Args:
        sources: what to look at.
        settings: what counts as a pair.
        folder: one file for each source is written here; any number of runs may share it. A source that was changed
            (by size or time), or is expected with another gap, is looked at again.
        workers: threads that decode.
        rank: number of this process.
        ranks: how many there are.
        wait: a barrier over them, called once.
        progress: wraps the iteration, for a progress bar.

    Returns:
        The index; it may hold no pair at all: see :func:`require_pairs`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mine = [source for number, source in enumerate(sources) if number % ranks == rank]
    start, decoded = time.perf_counter(), 0
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for fresh in progress(pool.map(lambda source: seen(source, settings.gap, folder)[1], mine), len(mine)):
            decoded += fresh
    seconds = time.perf_counter() - start
    wait()
    looked_at: list[_Looked] = []
    counts = dict.fromkeys(("frames", "pairs", "held_out_pairs", "cuts", "still_pairs", "still_pairs_left_out"), 0)
    faults: list[dict[str, str]] = []
    slow = 0
    for source in sources:
        scan, _ = seen(source, settings.gap, folder)
        if isinstance(scan, str):
            faults.append({"file": str(source.path), "what": scan, "used": "no"})
            continue
        if scan.note:
            faults.append({"file": str(source.path), "what": scan.note, "used": "the rest"})
        looked, numbers = _look(source, scan, settings)
        for name, number in numbers.items():
            counts[name] += number
        if not looked.kept.any():
            faults.append(_without_pair(looked))
            continue
        slow += int(np.diff(np.append(np.flatnonzero(scan.key), len(scan.key))).max(initial=0) > 600)
        looked_at.append(looked)
    # only now: what gives no pair cannot be measured on
    held = _held_out({group for looked in looked_at for group in looked.groups()}, settings)
    clips = []
    for looked in looked_at:
        clip = _clip(looked, settings, held)
        if not clip.train.any() and not clip.held_out.any():
            faults.append(_without_pair(looked))
            continue
        counts["pairs"] += int(clip.train.sum())
        counts["held_out_pairs"] += int(clip.held_out.sum())
        clips.append(clip)
    report = {
        "sources": len(sources), "usable": len(clips), **counts, "faults": faults,
        "indexed_frames_per_second": round(decoded / seconds, 1) if decoded else None,
    }  # fmt: skip
    if rank == 0:
        _warn(report, slow)
    return VideoIndex(clips, report)


def require_pairs(report: dict[str, Any]) -> None:
    """Refuse a collection without a single pair to train on.

    Raises:
        LaraArgumentError: it names what is wrong with the first sources.
    """
    if not report["pairs"]:
        listed = "; ".join(f"{fault['file']}: {fault['what']}" for fault in report["faults"][:3]) or "nothing was found"
        raise LaraArgumentError(
            f"no usable video among {report['sources']} sources ({listed}). Wanted are video files, folders of pictures "
            "or LeRobot datasets with more frames than the gap"
        )


def _warn(report: dict[str, Any], slow: int) -> None:
    faults = report["faults"]
    if faults:
        first = "; ".join(f"{fault['file']}: {fault['what']}" for fault in faults[:3])
        logger.warning("%d of %d sources are damaged or give no pair: %s", len(faults), report["sources"], first)
    if slow:
        logger.warning("%d videos have key frames more than 600 frames apart: reading from their middle is slow", slow)


def _held_out(names: set[str], settings: IndexSettings) -> set[str]:
    """Groups that are held out; chosen by a hash of the name, so that a video more changes nothing for the others."""
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


class _Looked(NamedTuple):
    """A source before it is known what is held out.

    source, pts, keys, future: as in :class:`Clip`.
    kept: [T] bool, whether the pair that starts here is of use.
    part: [T] int32, number of the episode; -1: of none.
    """

    source: Source
    pts: np.ndarray
    keys: np.ndarray
    future: np.ndarray
    kept: np.ndarray
    part: np.ndarray

    def groups(self) -> set[str]:
        """The groups of which there are pairs."""
        names = _groups(self.source)
        return {names[number] for number in np.unique(self.part[self.kept]).tolist()}


def _without_pair(looked: _Looked) -> dict[str, str]:
    return {"file": str(looked.source.path), "what": f"no pair of frames in {len(looked.pts)} frames", "used": "no"}


def _look(source: Source, scan: Scan, settings: IndexSettings) -> tuple[_Looked, dict[str, int]]:
    """Which pairs of a source are of use."""
    total = len(scan.pts)
    cuts = cuts_of(scan.change, settings.cut_threshold)
    part = np.zeros(total, np.int32)
    if source.segments:
        part[:] = -1
        tick = float(np.median(np.diff(scan.seconds))) if total > 1 else 0.0
        for number, segment in enumerate(source.segments):
            # half a frame of tolerance: the table and the file round differently
            member = (scan.seconds >= segment.start - tick / 2) & (scan.seconds < segment.stop - tick / 2)
            part[member] = number
    shot = np.cumsum(cuts | scan.broken)
    other = np.maximum(scan.future, 0)
    usable = (scan.future >= 0) & (part >= 0) & (shot[other] == shot) & (part[other] == part)
    still = usable & (scan.motion < settings.still_threshold)
    few = thinned(still, settings.still_keep)
    looked = _Looked(source, scan.pts, np.flatnonzero(scan.key).astype(np.int32), scan.future, usable & few, part)
    return looked, {
        "frames": total, "cuts": int(cuts.sum()), "still_pairs": int(still.sum()),
        "still_pairs_left_out": int((still & ~few).sum()),
    }  # fmt: skip


def _clip(looked: _Looked, settings: IndexSettings, held: set[str]) -> Clip:
    """Divide the pairs of a source into those to train on and those that are held out."""
    total, kept = len(looked.pts), looked.kept
    flags = np.array([*(group in held for group in _groups(looked.source)), False])  # the last is that of part -1
    held_frames = flags[looked.part]
    if not held and settings.held_out:
        # a single video: its last stretch is held out, and no trained pair reaches into it
        border = int(total * (1 - settings.held_out))
        held_frames = np.arange(total) >= border
        kept = kept & (held_frames[np.maximum(looked.future, 0)] == held_frames)
    parts = np.flatnonzero(np.diff(looked.part, prepend=-2))
    return Clip(
        looked.source, looked.pts, looked.keys, looked.future, kept & ~held_frames, kept & held_frames,
        np.append(parts, total).astype(np.int32),
    )  # fmt: skip
