"""C, the distance between the two frames of a pair: parsed here, whoever asks for it."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..errors import LaraArgumentError

__all__ = ["Gap", "parse_gap"]


class Gap(NamedTuple):
    """How far apart the frames of a pair are; one of the two is None."""

    frames: int | None = None  # a number of frames >= 1
    seconds: float | None = None  # a time > 0; the nearest frame is taken

    def __str__(self) -> str:
        return f"{self.seconds!r}s" if self.frames is None else str(self.frames)

    def in_frames(self, fps: float) -> int:
        """The number of frames at a frame rate.

        Raises:
            LaraArgumentError: the seconds are less than one frame.
        """
        frames = round((self.seconds or 0.0) * fps) if self.frames is None else self.frames
        if frames < 1:
            raise LaraArgumentError(f"gap={str(self)!r} at {fps:g} frames per second is less than one frame")
        return frames


def parse_gap(gap: str | int | Gap) -> Gap:
    """Read a gap.

    Args:
        gap: frames (16 or "16"), or seconds ("0.5s").

    Raises:
        LaraArgumentError: it is neither, or not above zero.
    """
    text = str(gap).strip()
    try:
        parsed = Gap(seconds=float(text[:-1])) if text.endswith("s") else Gap(frames=int(text))
    except ValueError:
        parsed = Gap()
    value = parsed.seconds if parsed.frames is None else parsed.frames
    if value is None or not 0 < value < math.inf:
        raise LaraArgumentError(f'gap={gap!r}, but frames >= 1 ("16") or seconds > 0 ("0.5s") are expected')
    return parsed
