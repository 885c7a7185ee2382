"""Reading some frames of a video file with torchcodec: a second decoder beside `av`, used where it is asked for.

It is asked for frames by their time, and what it returns is taken only if it carries the time stamps of the index; a
file that it cannot read, or reads as another one, is left to `av`, and so is one with a display matrix, of which
torchcodec 0.11 knows the angle and not that it mirrors. It scales while it decodes, as `av` does here, but from RGB and
not from YUV: the two differ by a few levels at edges, so that a run keeps to the one it began with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError

__all__ = ["read_by_time", "require_torchcodec"]


def require_torchcodec() -> tuple[Any, Any]:
    """torchcodec's VideoDecoder and its transform Resize.

    Raises:
        DatasetError: it is not installed, too old, or finds no FFmpeg.
    """
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize
    # installed is not enough: without FFmpeg's shared libraries the import fails with many lines of one of these
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DatasetError(
            "decoder='torchcodec' cannot be used here: it needs torchcodec (pip install torchcodec, of the version that "
            "belongs to the installed torch; one with torchcodec.transforms, tested with 0.11) and the shared libraries "
            f"of FFmpeg (apt install ffmpeg). The default, decoder='av', needs neither. ({type(error).__name__}: {reason})"
        ) from error
    return VideoDecoder, Resize


def read_by_time(path: Path, stamps: np.ndarray, tick: float, size: int) -> np.ndarray | None:
    """Some frames of a video file.

    Args:
        path: the file.
        stamps: [n] int, rising: time stamps of the frames, in units of the file.
        tick: that unit in seconds, > 0.
        size: side in pixels of the result.

    Returns:
        [n, size, size, 3] uint8, RGB; None if torchcodec cannot read them, or gives frames of other times.

    Raises:
        DatasetError: torchcodec cannot be used here.
    """
    video_decoder, resize = require_torchcodec()
    times = stamps.astype(np.float64) * tick
    try:
        # approximate: no pass over the whole file; the time stamps are compared below. Absolute: FFmpeg takes a relative
        # name with a colon for an address
        decoder = video_decoder(
            os.path.abspath(path), dimension_order="NHWC", seek_mode="approximate", num_ffmpeg_threads=1,
            transforms=[resize((size, size))],
        )  # fmt: skip
        if getattr(decoder.metadata, "rotation", "not said by this version") is not None:
            return None
        # half a unit later, where the frame is on show whatever way the times are rounded
        played = decoder.get_frames_played_at((times + tick / 2).tolist())
        frames: np.ndarray = played.data.numpy()
        seconds = played.pts_seconds.numpy()
    except (RuntimeError, ValueError, IndexError):  # what its C++ raises for a damaged file, a time past the end, ...
        return None
    shape = (len(stamps), size, size, 3)
    if frames.shape != shape or frames.dtype != np.uint8 or (np.abs(seconds - times) > tick / 2).any():
        return None
    return frames
