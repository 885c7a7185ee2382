"""Frames of a source: all in order (to index it), or a few by number (to train on them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import DatasetError
from .dataset import Content
from .orientation import Orientation
from .sources import Source, list_pictures, shown
from .torchcodec_backend import read_by_time, require_torchcodec
from .video import Converter, Decoded, VideoFile, picture_frame, require_av

__all__ = ["decode_all", "read_frames", "require_decoder"]

_Found = tuple[int, Any, Orientation]  # number of a frame, av's frame, how it has to be turned


def require_decoder(decoder: str) -> None:
    """Refuse a decoder ("av", or "torchcodec", which needs `av` too) that cannot be imported.

    Raises:
        DatasetError: a package, or FFmpeg's libraries for torchcodec, are missing; the message says which.
    """
    require_av()
    if decoder == "torchcodec":
        require_torchcodec()


def decode_all(source: Source) -> Iterator[Decoded]:
    """Every frame of a source that can be decoded, in order.

    Raises:
        DatasetError: it cannot be opened, or holds no video.
    """
    if source.kind == "video":
        with _open_video(source) as video:
            yield from video.decode()
        return
    broken = False
    for number, content in enumerate(_picture_files(source)):
        try:
            frame, orientation = picture_frame(content, shown(source.path))
        except DatasetError:
            broken = True
            continue
        yield Decoded(frame, number, number / source.fps, True, broken, orientation)
        broken = False


def _open_video(source: Source) -> VideoFile:
    content = source.dataset.open_inside(source.inside) if source.dataset is not None and source.inside else None
    return VideoFile(source.path, content)


def read_frames(
    source: Source, pts: np.ndarray, keys: np.ndarray, numbers: np.ndarray, size: int, decoder: str = "av"
) -> np.ndarray:
    """Some frames of a source, close together.

    Args:
        source: what to read.
        pts: [T] int64, time stamp of every frame, as the index holds them; strictly rising, or all -1: then frames are
            counted from the start of the file.
        keys: [K] int, rising: numbers of the frames at which decoding can start.
        numbers: [n] int, rising: numbers of the frames to read.
        size: side in pixels of the result.
        decoder: "av", or "torchcodec" for the video files that it can read; `av` reads the others, and pictures.

    Returns:
        [n, size, size, 3] uint8, RGB.

    Raises:
        DatasetError: torchcodec is asked for and cannot be used here; or a frame that the index knows cannot be decoded
            any more: the file was changed, or cannot be reached.
    """
    stamped = pts[-1] != pts[0]
    if decoder == "torchcodec" and source.kind == "video" and stamped and not source.inside:
        with VideoFile(source.path) as video:
            tick = video.tick  # an index with time stamps was made from a file that has it
        frames = read_by_time(source.path, pts[numbers], tick, size)
        if frames is not None:
            return frames
    convert, rest = Converter(size), set(numbers.tolist())
    read: dict[int, np.ndarray] = {}
    for passes in _passes(source, pts, keys, numbers.tolist()):
        try:
            for number, frame, orientation in passes:
                if number in rest:
                    read[number] = convert(frame, orientation)
                    rest.remove(number)
                    if not rest:
                        return np.stack([read[number] for number in numbers.tolist()])
        except DatasetError:
            continue  # a container that cannot seek, or breaks off
    raise DatasetError(
        f"{shown(source.path)}: {len(rest)} of the frames {numbers[0]} to {numbers[-1]} cannot be decoded, though they "
        "could when the folder was indexed; was the file changed? Training can be resumed"
    )


def _passes(source: Source, pts: np.ndarray, keys: np.ndarray, numbers: list[int]) -> Iterator[Iterable[_Found]]:
    """Passes over a source, each giving some frames: the first should do, the later ones are more careful."""
    if source.kind != "video":
        yield _some_pictures(source, pts[numbers].tolist(), numbers)
    elif pts[-1] == pts[0]:
        yield ((number, decoded.frame, decoded.orientation) for number, decoded in enumerate(decode_all(source)))
    else:
        number_of = dict(zip(pts[numbers].tolist(), numbers))
        before = keys[keys <= numbers[0]][::-1][:3:2]  # the last key frame, and the one two before it
        for seek in [*pts[before].tolist(), None]:
            yield _from_time(source, seek, int(pts[numbers[-1]]), number_of)


def _from_time(source: Source, seek: int | None, last: int, number_of: dict[int, int]) -> Iterator[_Found]:
    with _open_video(source) as video:
        for decoded in video.decode(seek):
            if decoded.pts is None:
                continue
            if decoded.pts > last:
                return
            yield number_of.get(decoded.pts, -1), decoded.frame, decoded.orientation


def _some_pictures(source: Source, places: list[int], numbers: list[int]) -> Iterator[_Found]:
    for number, content in zip(numbers, _picture_files(source, places)):
        yield number, *picture_frame(content, shown(source.path))


def _picture_files(source: Source, places: Sequence[int] | None = None) -> Iterator[Content]:
    """The pictures of a folder or an episode; all, or those at some rising places. Empty bytes: cannot be read."""
    if source.kind == "episode":
        assert source.dataset is not None
        episode = source.dataset.episode(source.segments[0].episode)
        yield from source.dataset.contents(source.column, episode, places)
        return
    paths = list_pictures(source.path)
    for place in range(len(paths)) if places is None else places:
        try:
            yield paths[place].read_bytes()
        except (OSError, IndexError):
            yield b""
