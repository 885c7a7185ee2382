"""Scans kept in a folder: a file for each source, made again when the source changes.

Only what was seen is kept. That a source could not be opened may be the machine's fault and not the file's (a codec, a
permission, a mount, a bad disk), so it is found out again each time, which takes no time worth keeping.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy as tensors
from safetensors import SafetensorError

from ..errors import DatasetError
from ..storage.files import replace_file
from .gap import Gap
from .scan import Scan, scan_source
from .sources import Source, list_pictures, shown

__all__ = ["has_scan", "load_scan", "read_scan", "scan_key"]

_SCHEMA = 1
_TEXTS = "note", "turned"


def load_scan(source: Source, gap: Gap, folder: Path, key: str = "") -> tuple[Scan | str, int]:
    """The scan of a source (or what is wrong with it), and how many frames were decoded for that now.

    Args:
        source: what to look at.
        gap: how far apart the frames of a pair are.
        folder: of the scans; it exists.
        key: :func:`scan_key` of the source, where it is known.
    """
    key = key or scan_key(source, gap)
    kept = read_scan(folder, key)
    if kept is not None:
        return kept, 0
    try:
        scan = scan_source(source, gap)
    except DatasetError as error:
        return str(error), 0
    except OSError as error:  # a folder of pictures that cannot be listed
        return f"{shown(source.path)} cannot be read ({type(error).__name__}: {error})", 0
    arrays: dict[str, Any] = scan._asdict()
    arrays |= {name: np.frombuffer(arrays[name].encode(), np.uint8) for name in _TEXTS}
    with replace_file(_path(folder, key)) as fresh:
        fresh.write_bytes(gzip.compress(tensors.save(arrays), compresslevel=6, mtime=0))
    return scan, len(scan.pts)


def read_scan(folder: Path, key: str) -> Scan | None:
    """The scan that is kept under a key; None if there is none, or a damaged one."""
    # not .npz: numpy reads its headers with ast, which fails at times if two threads do (python/cpython#106905)
    try:
        stored = tensors.load(gzip.decompress(_path(folder, key).read_bytes()))  # gzip has a checksum, safetensors none
        fields: dict[str, Any] = {name: stored[name] for name in Scan._fields}
    except (OSError, ValueError, KeyError, EOFError, zlib.error, SafetensorError):
        return None
    return Scan(**{name: value.tobytes().decode() if name in _TEXTS else value for name, value in fields.items()})


def has_scan(folder: Path, key: str) -> bool:
    """Whether a scan is kept under a key; it is not looked at."""
    return _path(folder, key).is_file()


def scan_key(source: Source, gap: Gap) -> str:
    """32 hexadecimal digits that stand for everything a scan depends on."""
    state: Any = _stat(source.path)
    if source.kind == "pictures":
        with contextlib.suppress(OSError):  # a folder that cannot be listed has no scan either
            about = [(path.name, *_stat(path)) for path in list_pictures(source.path)]
            state = hashlib.sha256(repr(about).encode()).hexdigest()
    # repr escapes names that are not UTF-8; of a video the camera's name does not matter
    column = source.column if source.kind == "episode" else ""
    parts: list[Any] = [_SCHEMA, os.path.abspath(source.path), state, source.kind, source.fps, column, tuple(gap)]
    if source.inside or source.kind == "episode":
        parts += [source.inside, [segment[1:] for segment in source.segments]]
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:32]


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors.gz"


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
