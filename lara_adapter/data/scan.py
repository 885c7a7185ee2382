"""One pass over a source: time stamps, cuts, and how much moves between the two frames of each pair."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import DatasetError
from .decode import decode_all
from .gap import Gap
from .orientation import UPRIGHT
from .sources import Source, shown
from .video import Converter

__all__ = ["Scan", "find_cuts", "scan_source", "thin_out"]

_THUMB = 32  # side in pixels of what frames are compared by
_MOVING = 16  # of its 1024 pixels: a small gripper moves few
_AROUND = 2  # frames on each side that a cut is judged against


class Scan(NamedTuple):
    """What is known of a source of T frames after one pass."""

    pts: np.ndarray  # [T] int64, strictly rising time stamps; all -1 if the file has none that are of use
    seconds: np.ndarray  # [T] float64, rising
    key: np.ndarray  # [T] bool, decoding can start here
    broken: np.ndarray  # [T] bool, something before it could not be decoded
    change: np.ndarray  # [T] float32, mean absolute difference to the previous frame, [0, 1]; 0 for the first
    future: np.ndarray  # [T] int32, the other frame of the pair that starts here; -1: there is none
    motion: np.ndarray  # [T] float32, mean absolute difference of the pair where it differs most, [0, 1]
    note: str = ""  # what is wrong with the file; empty if nothing is
    turned: str = ""  # how its first frame is turned, as the file says; empty: it is not


def scan_source(source: Source, gap: Gap) -> Scan:
    """Decode a source once, from start to end, holding only the frames of one gap in memory (as thumbnails).

    Returns:
        The scan; a file that breaks off in the middle is good up to there, and `note` says so.

    Raises:
        DatasetError: nothing can be decoded.
    """
    convert = Converter(_THUMB, "AREA")
    # a few bytes a frame: videos may be ten hours long
    pts, seconds, key, broken = array("q"), array("d"), bytearray(), bytearray()
    change, future, motion = array("f"), array("i"), array("f")
    stamped = True
    waiting: deque[tuple[int, np.ndarray]] = deque()
    before: np.ndarray | None = None
    note = turned = ""
    try:
        for number, decoded in enumerate(decode_all(source)):
            if not number and decoded.orientation != UPRIGHT:
                turned = str(decoded.orientation)
            thumb = convert(decoded.frame).astype(np.int16)
            stamped = stamped and decoded.pts is not None
            pts.append(-1 if decoded.pts is None else decoded.pts)
            seconds.append(decoded.seconds)
            key.append(decoded.key)
            broken.append(decoded.broken)
            change.append(0.0 if before is None else float(np.abs(thumb - before).mean()) / 255)
            future.append(-1)
            motion.append(0.0)
            waiting.append((number, thumb))
            while waiting:
                start, first = waiting[0]
                partner = _partner(start, number, seconds, gap)
                if partner < 0:
                    break
                waiting.popleft()
                if partner > start:
                    future[start] = partner
                    motion[start] = _motion(first, thumb if partner == number or before is None else before)
            before = thumb
    except DatasetError as error:
        # a bad disk or a mount that is gone says nothing about the file, and must not be kept with its scan
        if not pts or isinstance(error.__cause__, OSError):
            raise
        note = f"breaks off after {len(pts)} frames: {error}"
    if not pts:
        raise DatasetError(f"{shown(source.path)} holds no frame that can be decoded")
    if gap.seconds is not None and len(pts) > 1 and before is not None:
        end = len(pts) - 1
        tick = seconds[end] - seconds[end - 1]
        for start, first in waiting:  # the last frame may be the nearest to a time that was not reached
            beyond = seconds[start] + gap.seconds - seconds[end]
            if start < end and beyond <= tick / 2 and _close(end, start, seconds, gap.seconds):
                future[start], motion[start] = end, _motion(first, before)
    stamps, times = np.array(pts, np.int64), np.array(seconds)
    if not stamped or (np.diff(stamps) <= 0).any():
        stamps[:] = -1
        if source.kind == "video" and gap.seconds is not None:
            raise DatasetError(
                f"{shown(source.path)} has no usable time stamps: give the gap in frames, not in seconds"
            )
    if sum(broken) and not note:
        note = f"damaged at {sum(broken)} of {len(pts)} frames"
    return Scan(
        stamps, times, np.array(key, bool), np.array(broken, bool), np.array(change, np.float32),
        np.array(future, np.int32), np.array(motion, np.float32), note, turned,
    )  # fmt: skip


def _motion(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of the pixels that differ most, [0, 1]."""
    difference = np.abs(first - second).max(axis=2).ravel()
    return float(np.partition(difference, -_MOVING)[-_MOVING:].mean()) / 255


def _partner(start: int, newest: int, seconds: Sequence[float], gap: Gap) -> int:
    """The other frame of the pair that starts at `start`; -1: not reached yet; `start` itself: there is none."""
    if gap.frames is not None:
        return newest if newest - start == gap.frames else -1
    assert gap.seconds is not None
    if not seconds[newest] >= seconds[start] + gap.seconds:  # a NaN never gets a partner
        return -1
    target = seconds[start] + gap.seconds
    nearest = newest if seconds[newest] - target <= target - seconds[newest - 1] else newest - 1
    return nearest if _close(nearest, start, seconds, gap.seconds) else start


def _close(end: int, start: int, seconds: Sequence[float], gap: float) -> bool:
    return abs(seconds[end] - seconds[start] - gap) <= gap / 4


def find_cuts(change: np.ndarray, threshold: float) -> np.ndarray:
    """Where a new shot begins, [T] bool: the picture changes a lot, and at once.

    A frame counts as a cut if it differs from the one before by `threshold` or more, and by three times the mean of the
    differences around it, so that a fast camera does not count. Fades and dissolves are not found.

    Args:
        change: [T] float, as in :class:`Scan`.
        threshold: in [0, 1]; 0: no cuts.
    """
    if not threshold:
        return np.zeros(len(change), bool)
    padded = np.pad(change.astype(np.float64), _AROUND)
    exists = np.pad(np.arange(len(change)) > 0, _AROUND)  # the first frame has no difference
    window = 2 * _AROUND + 1
    total = np.convolve(padded, np.ones(window), "valid") - change
    count = np.convolve(exists, np.ones(window), "valid") - (np.arange(len(change)) > 0)
    cuts: np.ndarray = (change >= threshold) & (change >= 3 * total / np.maximum(count, 1))
    return cuts


def thin_out(still: np.ndarray, keep: float) -> np.ndarray:
    """Which pairs are kept, [T] bool: all that are not `still` [T] bool, and an even share `keep` [0, 1] of the still."""
    rank = np.cumsum(still)
    kept: np.ndarray = ~still | (np.floor(rank * keep) > np.floor((rank - 1) * keep))
    return kept
