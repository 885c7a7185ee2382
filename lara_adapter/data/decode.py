"""Frames of a source: all in order (to index it), or a few by number (to train on them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..errors import DatasetError
from .episodes import cell_bytes, require_parquet
from .sources import Source, list_pictures
from .torchcodec_backend import read_by_time, require_torchcodec
from .video import Converter, Decoded, VideoFile, picture_frame, require_av

__all__ = ["decode_all", "read_frames", "require_decoder"]


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
        with VideoFile(source.path) as video:
            yield from video.decode()
        return
    broken = False
    for number, content in enumerate(_picture_files(source)):
        try:
            frame = picture_frame(content, str(source.path))
        except DatasetError:
            broken = True
            continue
        yield Decoded(frame, number, number / source.fps, True, broken)
        broken = False


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
    if decoder == "torchcodec" and source.kind == "video" and stamped:
        with VideoFile(source.path) as video:
            tick = video.tick  # an index with time stamps was made from a file that has it
        frames = read_by_time(source.path, pts[numbers], tick, size)
        if frames is not None:
            return frames
    convert, rest = Converter(size), set(numbers.tolist())
    read: dict[int, np.ndarray] = {}
    for passes in _passes(source, pts, keys, numbers.tolist()):
        try:
            for number, frame in passes:
                if number in rest:
                    read[number] = convert(frame)
                    rest.remove(number)
                    if not rest:
                        return np.stack([read[number] for number in numbers.tolist()])
        except DatasetError:
            continue  # a container that cannot seek, or breaks off
    raise DatasetError(
        f"{source.path}: {len(rest)} of the frames {numbers[0]} to {numbers[-1]} cannot be decoded, though they could when "
        "the folder was indexed; was the file changed? Training can be resumed"
    )


def _passes(
    source: Source, pts: np.ndarray, keys: np.ndarray, numbers: list[int]
) -> Iterator[Iterable[tuple[int, object]]]:
    """Passes over a source, each giving some (number, av's frame): the first should do, the later ones are more careful."""
    if source.kind != "video":
        yield _some_pictures(source, pts[numbers].tolist(), numbers)
    elif pts[-1] == pts[0]:
        yield ((number, decoded.frame) for number, decoded in enumerate(decode_all(source)))
    else:
        number_of = dict(zip(pts[numbers].tolist(), numbers))
        before = keys[keys <= numbers[0]][::-1][:3:2]  # the last key frame, and the one two before it
        for seek in [*pts[before].tolist(), None]:
            yield _from_time(source, seek, int(pts[numbers[-1]]), number_of)


def _from_time(source: Source, seek: int | None, last: int, number_of: dict[int, int]) -> Iterator[tuple[int, object]]:
    with VideoFile(source.path) as video:
        for decoded in video.decode(seek):
            if decoded.pts is None:
                continue
            if decoded.pts > last:
                return
            yield number_of.get(decoded.pts, -1), decoded.frame


def _some_pictures(source: Source, places: list[int], numbers: list[int]) -> Iterator[tuple[int, object]]:
    for number, content in zip(numbers, _picture_files(source, places)):
        yield number, picture_frame(content, str(source.path))


def _picture_files(source: Source, places: Sequence[int] | None = None) -> Iterator[bytes]:
    """Content of the picture files of a folder or a parquet column; all, or those at some rising places."""
    if source.kind == "pictures":
        paths = list_pictures(source.path)
        for place in range(len(paths)) if places is None else places:
            try:
                yield paths[place].read_bytes()
            except (OSError, IndexError):
                yield b""
        return
    parquet = require_parquet()
    first = 0
    try:
        with parquet.ParquetFile(source.path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                inside = range(rows) if places is None else [p - first for p in places if 0 <= p - first < rows]
                first += rows
                if not inside:
                    continue
                column = file.read_row_group(group, columns=[source.column]).column(0)
                for row in inside:
                    try:
                        yield cell_bytes(column[row].as_py(), source.root)
                    except (DatasetError, OSError):
                        yield b""
    # pyarrow's errors derive from these
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{source.path} cannot be read ({type(error).__name__}: {error})") from error
