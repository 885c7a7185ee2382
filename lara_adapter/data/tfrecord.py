"""TFRecord files of `tf.train.Example`, read piece by piece: where each feature is, and only the parts that are asked for.

A record is a length (8 bytes), its checksum (4), the content, and its checksum (4). The content is an Example as Protocol
Buffers write it: each feature has a name and a list of byte strings, floats or integers, and in front of each its length.
Skipping by these lengths finds one picture among the hundreds of megabytes of an episode.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import DatasetError

__all__ = [
    "Feature", "Record", "byte_strings", "count", "features", "numbers", "open_records", "records", "require_crc32c",
    "verify",
]  # fmt: skip

_BYTES, _FLOATS, _INTEGERS = 0x0A, 0x12, 0x1A  # tags of Feature: bytes_list, float_list, int64_list
_HEAD = 1024  # bytes that hold the name of a feature and the lengths around it
_CHUNK = 1 << 20


class Record(NamedTuple):
    """Where the content of a record is in its file."""

    start: int
    size: int


class Feature(NamedTuple):
    """Where the values of a feature are in the file; tag 0: it has none."""

    tag: int
    start: int
    stop: int


def require_crc32c() -> Any:
    """google_crc32c, or a DatasetError that names the package to install."""
    try:
        import google_crc32c
    except ImportError as error:
        raise DatasetError(f"RLDS datasets need google-crc32c: pip install 'lara-adapter[rlds]' ({error})") from error
    return google_crc32c


def open_records(path: Path) -> BinaryIO:
    """Open a file; the small buffer suits reading lengths here and there."""
    return path.open("rb", buffering=4096)


def records(file: BinaryIO) -> Iterator[Record]:
    """The records of a file; their lengths are verified, their contents are not.

    Raises:
        ValueError: the file is damaged: no record after this place can be found.
    """
    size, position = file.seek(0, 2), 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        if len(head) < 12:
            raise ValueError(f"the file is truncated after {position} bytes")
        length, checksum = struct.unpack("<QI", head)
        if _masked(require_crc32c().value(head[:8])) != checksum:
            raise ValueError(f"there is no record at byte {position}: the checksum of its length is wrong")
        if position + 12 + length + 4 > size:
            raise ValueError(
                f"the file is truncated: it has {size} bytes, and a record ends at {position + length + 16}"
            )
        yield Record(position + 12, length)
        position += 12 + length + 4


def verify(file: BinaryIO, record: Record) -> None:
    """Read all of a record and compare its checksum.

    Raises:
        ValueError: it differs.
    """
    crc32c, checksum, rest = require_crc32c(), 0, record.size
    file.seek(record.start)
    while rest:
        content = file.read(min(rest, _CHUNK))
        if not content:
            raise ValueError("the file became shorter")
        checksum, rest = crc32c.extend(checksum, content), rest - len(content)
    if struct.pack("<I", _masked(checksum)) != file.read(4):
        raise ValueError("the content is damaged: its checksum is wrong")


def _masked(checksum: int) -> int:
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def features(file: BinaryIO, record: Record) -> Iterator[tuple[str, Feature]]:
    """The features of an Example, by name.

    Raises:
        ValueError: it is not an Example.
    """
    for start, stop in _parts(file, record.start, record.start + record.size):
        for first, last in _parts(file, start, stop):
            file.seek(first)
            head = file.read(min(_HEAD, last - first))
            try:
                size, key = _length(head, 0, 0x0A)
                name = head[key : key + size].decode()
                size, value = _length(head, key + size, 0x12)
                if size == 0:
                    yield name, Feature(0, 0, 0)
                    continue
                tag = head[value]
                size, values = _length(head, value, tag)
            except (IndexError, UnicodeDecodeError) as error:
                raise ValueError("the record is not a tf.train.Example") from error
            if tag not in (_BYTES, _FLOATS, _INTEGERS) or first + values + size > last:
                raise ValueError(f"the record is not a tf.train.Example: {name}")
            yield name, Feature(tag, first + values, first + values + size)


def count(file: BinaryIO, feature: Feature) -> int:
    """The number of its values, without reading byte strings."""
    parts = _parts(file, feature.start, feature.stop)
    if feature.tag == _FLOATS:
        return sum(stop - start for start, stop in parts) // 4
    if feature.tag == _INTEGERS:  # each ends with a byte below 128
        return sum(int((np.frombuffer(_read(file, *part), np.uint8) < 128).sum()) for part in parts)
    return sum(1 for _ in parts)


def byte_strings(file: BinaryIO, feature: Feature, places: Sequence[int] | None = None) -> Iterator[bytes]:
    """The byte strings of a list; all, or those at rising places.

    Raises:
        ValueError: it holds other values, or fewer.
    """
    if feature.tag not in (0, _BYTES):
        raise ValueError("a list of byte strings is expected")
    rest = None if places is None else iter(places)
    wanted = None if rest is None else next(rest, -1)
    for place, part in enumerate(_parts(file, feature.start, feature.stop)):
        if wanted is None or place == wanted:
            yield _read(file, *part)
            if rest is not None:
                wanted = next(rest, -1)
                if wanted == -1:
                    return
    if wanted not in (None, -1):
        raise ValueError(f"entry {wanted} is missing")


def numbers(file: BinaryIO, feature: Feature) -> np.ndarray:
    """The numbers of a list, [n] float32 or int64.

    Raises:
        ValueError: it holds byte strings.
    """
    if feature.tag == _BYTES:
        raise ValueError("a list of numbers is expected")
    content = b"".join([_read(file, *part) for part in _parts(file, feature.start, feature.stop)])
    if feature.tag == _FLOATS:
        return np.frombuffer(content, "<f4")
    digits = np.frombuffer(content, np.uint8)  # 7 bits each, the lowest first; the last of a number is below 128
    ends = np.flatnonzero(digits < 128)
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 7 * (np.arange(ends[-1] + 1) - starts.repeat(ends - starts + 1))
    shifted = (digits[: ends[-1] + 1] & 127).astype(np.uint64) << shifts.astype(np.uint64)
    return np.add.reduceat(shifted, starts).view(np.int64)


def _parts(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where the entries of a message are that has one repeated field: byte strings, messages, or packed numbers."""
    while start < stop:
        file.seek(start)
        size, skipped = _length(file.read(min(11, stop - start)), 0, 0x0A)
        start += skipped
        if start + size > stop:
            raise ValueError("the record is not a tf.train.Example: an entry is longer than what it is in")
        yield start, start + size
        start += size


def _length(content: bytes, position: int, tag: int) -> tuple[int, int]:
    """The length that follows a tag, and the position after it."""
    if content[position : position + 1] != bytes([tag]):
        raise ValueError("the record is not a tf.train.Example")
    value, shift = 0, 0
    while True:
        position += 1
        if position >= len(content) or shift > 63:
            raise ValueError("the record is not a tf.train.Example")
        value |= (content[position] & 127) << shift
        if content[position] < 128:
            return value, position + 1
        shift += 7


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    content = file.read(stop - start)
    if len(content) < stop - start:
        raise ValueError("the file became shorter")
    return content
