"""Uncompressed tar archives with random access: where each file is in them, and one of them as a file of its own."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

__all__ = ["FileRange", "Member", "members"]

_BLOCK = 512
_END = bytes(_BLOCK)
_LONGEST = 4096  # bytes of an extended header that are looked at here
_KEYS = re.compile(rb"(?:^|\n)[0-9]+ ([^=]*)=")
_TIMES = frozenset({b"mtime", b"atime", b"ctime"})


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    header: int  # where its header starts
    start: int  # where its content starts
    size: int  # bytes of the content
    stop: int  # where the next header starts


def members(file: BinaryIO, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files of an archive in order; the last one may reach over the end of a truncated archive.

    Args:
        file: the archive, uncompressed.
        start: where a header starts.
        stop: where to end; None: at the end of the archive.

    Raises:
        ValueError: the archive is damaged or truncated: nothing after this place can be found.
    """
    end, position = file.seek(0, 2), start
    while stop is None or position < stop:
        file.seek(position)
        head = file.read(_BLOCK)
        if len(head) < _BLOCK:
            raise ValueError(f"it is truncated after {end} bytes")
        if head == _END:
            return
        member = _behind_times(file, head, position) if head[156:157] == b"x" else _plain(head, position)
        if member is None:
            file.seek(position)
            try:
                with tarfile.TarFile(fileobj=file) as archive:  # reads one header, and leaves the file open
                    info, after = archive.next(), archive.offset
            except tarfile.TarError as error:
                raise ValueError(f"it is damaged at byte {position} ({error})") from error
            if info is None:
                raise ValueError(f"it is damaged at byte {position}")
            position, member = after, Member(info.name, position, info.offset_data, info.size, after)
            if not info.isreg() or info.issparse():
                continue
        yield member
        if member.start + member.size > end:
            raise ValueError(f"it is truncated after {end} bytes, within {member.name}")
        position = member.stop


def _plain(head: bytes, position: int) -> Member | None:
    """The file that a header describes; None: it is something else, or has a long name. Four times as fast as tarfile."""
    if head[156:157] != b"0" or head[257:262] != b"ustar" or head[124] & 0x80:
        return None
    try:
        size = int(head[124:136].rstrip(b" \0"), 8)
        if int(head[148:156].rstrip(b" \0"), 8) != sum(head) - sum(head[148:156]) + 8 * 32:
            return None
    except ValueError:
        return None
    name = head[:100].split(b"\0", 1)[0]
    folder = head[345:500].split(b"\0", 1)[0] if head[262:263] == b"\0" else b""  # GNU's has other fields there
    name = folder + b"/" + name if folder else name
    start = position + _BLOCK
    return Member(name.decode("utf-8", "surrogateescape"), position, start, size, start + -(-size // _BLOCK) * _BLOCK)


def _behind_times(file: BinaryIO, head: bytes, position: int) -> Member | None:
    """The file behind an extended header that gives nothing but times: `webdataset` writes one before each file."""
    try:
        size = int(head[124:136].rstrip(b" \0"), 8)
    except ValueError:
        return None
    padded = -(-size // _BLOCK) * _BLOCK
    content = file.read(padded + _BLOCK) if padded <= _LONGEST else b""
    if not _TIMES.issuperset(_KEYS.findall(content, 0, size)) or len(content) < padded + _BLOCK:
        return None
    member = _plain(content[padded:], position + _BLOCK + padded)
    return member and member._replace(header=position)


class FileRange(io.RawIOBase):
    """A stretch of a file as a file of its own, read only.

    Args:
        path: the file.
        start: its first byte.
        size: bytes.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._start, self._size, self._position = start, size, 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can seek."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there are, at most as many as fit."""
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        self._file.seek(self._start + self._position)
        read = self._file.readinto(view) if len(view) else 0
        self._position += read or 0
        return read or 0

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()
