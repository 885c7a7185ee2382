"""Frames of a source: all in order (to index it), or a few by number (to train on them).

Decoding is `av` (FFmpeg), or torchcodec where it is asked for, in the calling thread and without the interpreter's lock
for the heavy parts, so that threads are enough. A frame is brought to its final size while it is converted to RGB: the
full picture is never made.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import FrameError
from .by_torchcodec import read_by_time
from .decode import require_av
from .encoded import encoded_pictures
from .sources import Source

__all__ = ["Converter", "Decoded", "decode_all", "read_frames", "write_png"]


class Decoded(NamedTuple):
    """One frame on its way through.

    frame: av's frame, not converted yet.
    pts: time stamp in the units of the file; None: it has none.
    seconds: the same in seconds; NaN: it has none.
    key: decoding can start here.
    broken: something before it could not be decoded, or it is itself damaged.
    """

    frame: Any
    pts: int | None
    seconds: float
    key: bool
    broken: bool


class Converter:
    """av's frames to square RGB arrays; keeps the scaler, which costs more to make than to use."""

    def __init__(self, size: int, interpolation: str = "BILINEAR") -> None:
        self.size, self.interpolation = size, interpolation
        self._scaler = require_av().video.reformatter.VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        """Return [S, S, 3] uint8; the aspect is not kept, as everywhere in this library."""
        scaled = self._scaler.reformat(frame, self.size, self.size, "rgb24", interpolation=self.interpolation)
        array: np.ndarray = scaled.to_ndarray()
        return array


# ---------------------------------------------------------------------- in order


def decode_all(source: Source) -> Iterator[Decoded]:
    """Every frame of a source, in order.

    Raises:
        FrameError: it cannot be opened, or holds no video.
    """
    if source.kind == "video":
        yield from _video_frames(source.path)
    else:
        broken = False
        for number, content in enumerate(encoded_pictures(source)):
            frame = _picture(content)
            if frame is None:
                broken = True
                continue
            yield Decoded(frame, number, number / source.fps, True, broken)
            broken = False


def _open(path: Path) -> tuple[Any, Any]:
    av = require_av()
    try:
        container = av.open(str(path), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise FrameError(f"{path} cannot be opened ({type(error).__name__}: {error})") from error
    if not container.streams.video:
        container.close()
        raise FrameError(f"{path} holds no video (only {[stream.type for stream in container.streams] or 'nothing'})")
    stream = container.streams.video[0]
    # one thread a file: several files are decoded at once, which gives more frames a second than many threads a file
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return container, stream


def _video_frames(path: Path, seek: int | None = None) -> Iterator[Decoded]:
    """Frames from the start, or from the key frame at or before a time stamp."""
    av = require_av()
    container, stream = _open(path)
    with container:
        if seek is not None:
            container.seek(seek, stream=stream, backward=True)
        base = float(stream.time_base) if stream.time_base else 0.0
        broken = False
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, EOFError):
                return
            except (av.error.FFmpegError, OSError) as error:
                raise FrameError(f"{path} breaks off ({type(error).__name__}: {error})") from error
            try:
                frames = packet.decode()
            except EOFError:
                return
            except (av.error.FFmpegError, OSError):
                # what follows is still of use, but no pair may reach over the hole
                broken = True
                continue
            for frame in frames:
                pts = frame.pts
                seconds = float("nan") if pts is None else pts * base
                broken = broken or bool(frame.is_corrupt)
                yield Decoded(frame, pts, seconds, bool(frame.key_frame), broken)
                broken = bool(frame.is_corrupt)


def _picture(content: bytes) -> Any:
    """av's frame of an encoded picture; None if it is damaged."""
    av = require_av()
    try:
        with av.open(io.BytesIO(content), metadata_errors="ignore") as container:
            return next(container.decode(video=0), None)
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return None


# ---------------------------------------------------------------------- by number


def read_frames(
    source: Source, pts: np.ndarray, keys: np.ndarray, wanted: np.ndarray, size: int, decoder: str = "av"
) -> np.ndarray:
    """Some frames of a source, close together.

    Args:
        source: what to read.
        pts: [T] int64, time stamp of every frame, as the index holds them; strictly rising, or all -1: then frames are
            counted from the start of the file.
        keys: [K] int, rising: numbers of the frames at which decoding can start.
        wanted: [n] int, rising: numbers of the frames to read.
        size: side in pixels of the result.
        decoder: "av", or "torchcodec" for the video files that it can read; `av` reads the others, and pictures.

    Returns:
        [n, size, size, 3] uint8, RGB.

    Raises:
        DatasetError: torchcodec is asked for and cannot be used here.
        FrameError: a frame that the index knows cannot be decoded any more: the file was changed, or cannot be reached.
    """
    if decoder == "torchcodec" and source.kind == "video" and pts[-1] != pts[0]:
        read = read_by_time(source.path, pts[wanted], _tick(source.path), size)
        if read is not None:
            return read
    converter = Converter(size)
    found: dict[int, np.ndarray] = {}
    numbers = wanted.tolist()
    if source.kind != "video":
        stamps = pts[wanted].tolist()  # of pictures the place in the folder, with holes for the damaged ones
        for number, content in zip(numbers, encoded_pictures(source, stamps)):
            frame = _picture(content)
            if frame is not None:
                found[number] = converter(frame)
    elif pts[-1] == pts[0]:
        _collect(enumerate(_video_frames(source.path)), set(numbers), numbers[-1], converter, found)
    else:
        number_of = dict(zip(pts[wanted].tolist(), numbers))
        before = keys[keys <= numbers[0]][::-1][:3:2]  # the last key frame, and the one two before it
        for seek in [*pts[before].tolist(), None]:
            try:
                frames = ((number_of.get(f.pts, -1), f) for f in _video_frames(source.path, seek))
                last = int(pts[numbers[-1]])
                _collect(_until(frames, last), set(numbers), numbers[-1], converter, found)
            except (require_av().error.FFmpegError, FrameError):
                continue  # a container that cannot seek, or breaks off
            if len(found) == len(numbers):
                break
    if len(found) < len(numbers):
        raise FrameError(
            f"{source.path}: {len(numbers) - len(found)} of the frames {numbers[0]} to {numbers[-1]} cannot be decoded, "
            "though they could when the folder was indexed; was the file changed? Training can be resumed"
        )
    return np.stack([found[number] for number in numbers])


def _tick(path: Path) -> float:
    """The unit of a file's time stamps, in seconds."""
    container, stream = _open(path)
    with container:
        return float(stream.time_base)  # an index with time stamps was made from a file that has it


def _until(frames: Iterator[tuple[int, Decoded]], last: int) -> Iterator[tuple[int, Decoded]]:
    """Stop once the time stamp has passed the last one wanted."""
    for number, decoded in frames:
        if decoded.pts is not None and decoded.pts > last:
            return
        yield number, decoded


def _collect(frames: Any, wanted: set[int], last: int, converter: Converter, found: dict[int, np.ndarray]) -> None:
    for number, decoded in frames:
        if number in wanted:
            found[number] = converter(decoded.frame)
            if number >= last:
                return


# ---------------------------------------------------------------------- writing


def write_png(path: Path, image: np.ndarray) -> None:
    """Write [H, W, 3] uint8 RGB as a PNG file."""
    av = require_av()
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))
