"""Decoding: the frames of a video file in order, each of them once, and single pictures. Needs PyAV."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import DatasetError

__all__ = ["SequentialVideo", "decode_picture", "require_av"]


def require_av() -> Any:
    """PyAV.

    Raises:
        DatasetError: it is not installed.
    """
    try:
        import av
        import av.error
        import av.video.reformatter
    except ImportError as error:
        raise DatasetError(f"decoding video needs PyAV: pip install 'lara-adapter[video]' ({error})") from error
    return av


def decode_picture(content: bytes, name: str) -> np.ndarray:
    """Decode a picture file (PNG, JPEG, ...).

    Args:
        content: the bytes of the file.
        name: what to call it in an error.

    Returns:
        [H, W, 3] uint8.

    Raises:
        DatasetError: it cannot be decoded.
    """
    av = require_av()
    try:
        with av.open(io.BytesIO(content)) as container:
            picture: np.ndarray = next(container.decode(video=0)).to_ndarray(format="rgb24")
    # av's errors derive from several built-in ones; StopIteration: it holds no picture
    except (av.error.FFmpegError, StopIteration, IndexError, ValueError) as error:
        raise DatasetError(f"{name} is no picture that can be decoded ({type(error).__name__}: {error})") from error
    return picture


class SequentialVideo:
    """A video file whose frames are read in order. A context manager; one decoder, which moves on from read to read.

    Reading one stretch after the other decodes each frame once. Only a jump (backwards, or over frames) seeks, to the
    key frame before.

    Args:
        path: the file.

    Raises:
        DatasetError: it cannot be opened, or holds no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        av = require_av()
        self._errors: tuple[type[Exception], ...] = (av.error.FFmpegError, ValueError)
        try:
            self._container = av.open(str(path))
        except self._errors as error:
            raise DatasetError(
                f"{path} cannot be opened as a video{_why(path)} ({type(error).__name__}: {error})"
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DatasetError(f"{path} holds no video stream")
        self._stream = self._container.streams.video[0]
        # One thread: where somebody set av.logging's level (torchvision.io does), a decoding thread of FFmpeg that has
        # something to say waits for the interpreter's lock, while a decoder that is put away holds it and waits for its
        # threads: a deadlock (seen with PyAV 15.0 and 15.1, not with 18.1).
        self._stream.thread_type, self._stream.codec_context.thread_count = "NONE", 1
        self._decoder: Iterator[Any] = iter(())
        self._time: float | None = None  # of the last frame decoded; None: nothing yet

    def __enter__(self) -> SequentialVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def fps(self) -> float:
        """Frames per second as the file states them; 30 where it does not."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        return float(rate) if rate else 30.0

    @property
    def length(self) -> int:
        """Frames as the file states them, or as its duration suggests; 0 where it states neither."""
        if self._stream.frames:
            return int(self._stream.frames)
        seconds = self._container.duration
        return round(seconds / 1e6 * self.fps) if seconds else 0

    def count(self) -> int:
        """Frames counted by their packets, undecoded, for a file that does not state how many; to be called first of all.

        Raises:
            DatasetError: the file is damaged.
        """
        try:
            found = sum(packet.size > 0 for packet in self._container.demux(self._stream))
        except self._errors as error:
            raise DatasetError(f"{self.path} is damaged ({type(error).__name__}: {error})") from error
        self._time = 0.0  # read from: the next reader begins with a jump
        return found

    def all_frames(self) -> Iterator[np.ndarray]:
        """Every frame from the beginning, [H, W, 3] uint8, whatever its time stamp.

        Raises:
            DatasetError: the file is damaged.
        """
        self._seek(0.0)
        for _, frame in self._decode():
            yield frame.to_ndarray(format="rgb24")

    def read(self, start: float, count: int, fps: float) -> Iterator[np.ndarray]:
        """The `count` frames at start, start + 1 / fps, ...

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
            self._seek(start)
        given = 0
        for time, frame in self._decode() if count else ():
            place = round((time - start) * fps)
            if place < given:  # before the stretch, or a second frame at the same place
                continue
            if place > given:
                raise DatasetError(
                    f"{self.path} has no frame at {start + given / fps:.3f} s (the next is at {time:.3f} s), but the "
                    f"dataset has {count} frames from {start:.3f} s on at {fps:g} frames per second"
                )
            yield frame.to_ndarray(format="rgb24")
            given += 1
            if given == count:
                return
        if given < count:
            raise DatasetError(
                f"{self.path} ends after {given} of {count} frames from {start:.3f} s on: the file is truncated, or the "
                "dataset's episodes do not fit it"
            )

    def _seek(self, start: float) -> None:
        if self._time is not None or start > 0:
            offset = int(start / self._stream.time_base) + (self._stream.start_time or 0 if start <= 0 else 0)
            try:
                self._container.seek(offset, stream=self._stream, backward=True, any_frame=False)
            except self._errors as error:
                raise DatasetError(f"{self.path}: no frame at {start:.3f} s ({error})") from error
        self._decoder = self._container.decode(self._stream)
        self._time = None

    def _decode(self) -> Iterator[tuple[float, Any]]:
        while True:
            try:
                frame = next(self._decoder, None)
            except self._errors as error:
                where = "at its beginning" if self._time is None else f"after {self._time:.3f} s"
                raise DatasetError(f"{self.path} is damaged {where} ({type(error).__name__}: {error})") from error
            if frame is None:
                return
            self._time = float(frame.pts * frame.time_base) if frame.pts is not None else 0.0
            yield self._time, frame


def _why(path: Path) -> str:
    """What a clone without Git LFS leaves is told apart from a damaged file."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return ": it is a pointer of Git LFS, not the video; fetch it with `git lfs pull`" if pointer else ""
