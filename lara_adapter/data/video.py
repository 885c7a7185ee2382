"""Video files and pictures, opened, probed and decoded: the one place that knows PyAV.

A file is decoded in the calling thread and without the interpreter's lock, so that threads over several files are enough.
Frames are returned as a player shows them: turned as the file's display matrix or the picture's EXIF data say.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import DatasetError
from .orientation import UPRIGHT, Orientation, orientation_of_frame, orientation_of_picture
from .sources import shown

__all__ = ["Converter", "Decoded", "VideoFile", "decode_picture", "picture_frame", "require_av", "write_png"]


def require_av() -> Any:
    """PyAV, or a DatasetError that names the package to install."""
    try:
        import av
        import av.error
        import av.video.reformatter
    except ImportError as error:
        raise DatasetError(f"decoding video needs PyAV: pip install 'lara-adapter[video]' ({error})") from error
    return av


class Decoded(NamedTuple):
    """One frame on its way through."""

    frame: Any  # av's frame, not converted yet
    pts: int | None  # time stamp in the units of the file; None: it has none
    seconds: float  # the same in seconds; NaN: it has none
    key: bool  # decoding can start here
    broken: bool  # something before it could not be decoded, or it is itself damaged
    orientation: Orientation = UPRIGHT  # how the frame has to be turned


class VideoFile:
    """An open video file; a context manager.

    Args:
        path: the file.
        content: an open file to read instead, for a video inside of another file; `path` is then what messages call it.

    Raises:
        DatasetError: it cannot be opened, or holds no video.
    """

    def __init__(self, path: Path, content: BinaryIO | None = None) -> None:
        self.path = shown(path)
        av = require_av()
        # av's own errors derive from several built-in ones
        self._errors: tuple[type[Exception], ...] = (av.error.FFmpegError, OSError, ValueError)
        try:
            # the protocol, or FFmpeg takes a name with a colon for an address
            place = f"file:{os.fspath(path)}" if content is None else content
            self._container = av.open(place, metadata_errors="ignore")
        except self._errors as error:
            reason = "" if content is not None else _lfs_hint(path)
            raise DatasetError(
                f"{self.path} cannot be opened as a video{reason} ({type(error).__name__}: {error})"
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DatasetError(f"{self.path} holds no video stream")
        self._stream = self._container.streams.video[0]
        # One thread: several files at once give more frames a second than many threads for one. And where somebody set
        # av.logging's level (torchvision.io does), a decoding thread of FFmpeg with something to log waits for the
        # interpreter's lock, while a decoder that is closed holds it and waits for its threads: a deadlock (PyAV 15.0
        # and 15.1, not 18.1).
        self._stream.thread_type, self._stream.codec_context.thread_count = "NONE", 1
        self._frames: Iterator[Decoded] = iter(())
        self._time: float | None = None  # of the last frame decoded; None: nothing yet

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # the generator refers to this object: a cycle would keep its frames, and FFmpeg's scaler, which blocks for ever
        # when it is freed in a process that was forked meanwhile
        self._frames = iter(())
        self._container.close()

    @property
    def fps(self) -> float:
        """Frames per second as the file states them; 30 where it does not."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        return float(rate) if rate else 30.0

    @property
    def tick(self) -> float:
        """The unit of the time stamps in seconds; 0 where the file has none."""
        return float(self._stream.time_base or 0)

    @property
    def length(self) -> int:
        """Frames as the file states them, or as its duration suggests; 0 where it states neither."""
        if self._stream.frames:
            return int(self._stream.frames)
        seconds = self._container.duration
        return round(seconds / 1e6 * self.fps) if seconds else 0

    @property
    def stated_seconds(self) -> float:
        """Where the video ends as the file states it, in seconds; 0 where it does not."""
        if self._stream.duration:
            return float((self._stream.start_time or 0) + self._stream.duration) * self.tick
        return float(self._container.duration or 0) / 1e6

    def count(self) -> int:
        """Frames counted by their packets, undecoded, for a file that does not state how many; only before decoding.

        Raises:
            DatasetError: the file is damaged.
        """
        try:
            number = sum(packet.size > 0 for packet in self._container.demux(self._stream))
        except self._errors as error:
            raise DatasetError(f"{self.path} is damaged ({type(error).__name__}: {error})") from error
        self._time = 0.0  # the file was read: the next reader has to seek
        return number

    def decode(self, seek: int | None = None, strict: bool = False) -> Iterator[Decoded]:
        """Frames from the key frame at or before a time stamp; None: from where the file is, at first its start.

        Args:
            seek: time stamp in the units of the file.
            strict: raise at what cannot be decoded, instead of marking the next frame as broken.

        Raises:
            DatasetError: the file cannot seek, breaks off, or is damaged.
        """
        if seek is not None:
            self._seek(seek)
        broken = False
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except (StopIteration, EOFError):
                return
            except self._errors as error:
                raise DatasetError(f"{self.path} breaks off ({type(error).__name__}: {error})") from error
            try:
                frames = packet.decode()
            except EOFError:
                return
            except self._errors as error:
                if strict:
                    raise self._damaged(f"{type(error).__name__}: {error}") from error
                broken = True
                continue
            for frame in frames:
                seconds = float("nan") if frame.pts is None else frame.pts * self.tick
                broken = broken or bool(frame.is_corrupt)
                yield Decoded(frame, frame.pts, seconds, bool(frame.key_frame), broken, orientation_of_frame(frame))
                broken = bool(frame.is_corrupt)

    def all_frames(self) -> Iterator[np.ndarray]:
        """Every frame from the beginning, [H, W, 3] uint8, whatever its time stamp.

        Raises:
            DatasetError: the file is damaged.
        """
        self._jump(0.0)
        for _, decoded in self._next_frames():
            yield self._to_rgb(decoded)

    def read(self, start: float, count: int, fps: float) -> Iterator[np.ndarray]:
        """The `count` frames at start, start + 1 / fps, ...

        One stretch after the other decodes each frame once; only a jump (backwards, or over frames) seeks.

        Args:
            start: time of the first one in the file, in seconds.
            count: how many.
            fps: their rate; a frame belongs to the nearest multiple of 1 / fps.

        Yields:
            [H, W, 3] uint8.

        Raises:
            DatasetError: the file is damaged, ends early, or lacks a frame.
        """
        if self._time is None or not 0 < (start - self._time) * fps < 1.5:
            self._jump(start)
        done = 0
        for time, decoded in self._next_frames() if count else ():
            place = round((time - start) * fps)
            if place < done:  # before the stretch, or a second frame at the same place
                continue
            if place > done:
                raise DatasetError(
                    f"{self.path} has no frame at {start + done / fps:.3f} s (the next is at {time:.3f} s), but the "
                    f"dataset has {count} frames from {start:.3f} s on at {fps:g} frames per second"
                )
            yield self._to_rgb(decoded)
            done += 1
            if done == count:
                return
        if done < count:
            raise DatasetError(
                f"{self.path} ends after {done} of {count} frames from {start:.3f} s on: the file is truncated, or the "
                "dataset's episodes do not fit it"
            )

    def _jump(self, start: float) -> None:
        seek = None
        if self._time is not None or start > 0:
            seek = int(start / self._stream.time_base) if start > 0 else self._stream.start_time or 0
        self._frames, self._time = self.decode(seek, strict=True), None

    def _seek(self, stamp: int) -> None:
        try:
            self._container.seek(stamp, stream=self._stream, backward=True, any_frame=False)
        except self._errors as error:
            raise DatasetError(f"{self.path}: cannot seek to {stamp * self.tick:.3f} s ({error})") from error

    def _next_frames(self) -> Iterator[tuple[float, Decoded]]:
        while (decoded := next(self._frames, None)) is not None:
            self._time = 0.0 if decoded.pts is None else decoded.seconds
            yield self._time, decoded

    def _to_rgb(self, decoded: Decoded) -> np.ndarray:
        if decoded.frame.is_corrupt:
            raise self._damaged("a corrupt frame")
        return decoded.orientation.turn(decoded.frame.to_ndarray(format="rgb24"))

    def _damaged(self, why: str) -> DatasetError:
        where = "at its beginning" if self._time is None else f"after {self._time:.3f} s"
        return DatasetError(f"{self.path} is damaged {where} ({why})")


def _lfs_hint(path: Path) -> str:
    """A clone without Git LFS leaves pointers, which are not damaged files."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return ": it is a pointer of Git LFS, not the video; fetch it with `git lfs pull`" if pointer else ""


class Converter:
    """av's frames to square RGB arrays; keeps the scaler, which costs more to make than to use.

    FFmpeg scales from YUV while it converts, so that the full picture is never made: several times faster than decoding
    to RGB and :func:`lara_adapter.lam.pixels.resize`, which it equals to about one level.
    """

    def __init__(self, size: int, interpolation: str = "BILINEAR") -> None:
        self.size, self.interpolation = size, interpolation
        self._scaler = require_av().video.reformatter.VideoReformatter()

    def __call__(self, frame: Any, orientation: Orientation = UPRIGHT) -> np.ndarray:
        """Return [S, S, 3] uint8, upright; the aspect ratio is not kept."""
        scaled = self._scaler.reformat(frame, self.size, self.size, "rgb24", interpolation=self.interpolation)
        return orientation.turn(scaled.to_ndarray())


# ---------------------------------------------------------------------- pictures


def picture_frame(content: bytes | np.ndarray, name: str) -> tuple[Any, Orientation]:
    """av's frame of a picture, and how it has to be turned.

    Args:
        content: of a picture file (PNG, JPEG, ...); or RGB [H, W, 3] uint8.
        name: what the error calls it.

    Raises:
        DatasetError: it cannot be decoded.
    """
    av = require_av()
    if isinstance(content, np.ndarray):
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(content), format="rgb24"), UPRIGHT
    try:
        with av.open(io.BytesIO(content), metadata_errors="ignore") as container:
            return next(container.decode(video=0)), orientation_of_picture(content)
    # StopIteration, IndexError: it holds no picture
    except (av.error.FFmpegError, OSError, StopIteration, IndexError, ValueError) as error:
        raise DatasetError(f"{name} is not a picture that can be decoded ({type(error).__name__}: {error})") from error


def decode_picture(content: bytes | np.ndarray, name: str) -> np.ndarray:
    """The same as :func:`picture_frame`, as an upright array [H, W, 3] uint8."""
    if isinstance(content, np.ndarray):
        return content
    frame, orientation = picture_frame(content, name)
    return orientation.turn(frame.to_ndarray(format="rgb24"))


def write_png(path: Path, image: np.ndarray) -> None:
    """Write [H, W, 3] uint8 RGB as a PNG file."""
    av = require_av()
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))
