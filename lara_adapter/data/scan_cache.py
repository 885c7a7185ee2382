"""Scans kept in a folder: a file for each source, made again when the source changes."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..storage.files import replace_file
from .gap import Gap
from .scan import Scan, scan_source
from .sources import Source, list_pictures

__all__ = ["load_scan"]

_SCHEMA = 1


def load_scan(source: Source, gap: Gap, folder: Path) -> tuple[Scan | str, int]:
    """The scan of a source (or what is wrong with it), and how many frames were decoded for that now."""
    path = folder / f"{_fingerprint(source, gap)}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            if "fault" in stored:
                return str(stored["fault"]), 0
            fields = {name: stored[name] for name in Scan._fields}
            return Scan(**{**fields, "note": str(fields["note"])}), 0
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # missing or damaged: it is made again
    content: dict[str, Any]
    scan: Scan | str
    try:
        scan = scan_source(source, gap)
        content, decoded = scan._asdict(), len(scan.pts)
    except DatasetError as error:
        scan, decoded = str(error), 0
        content = {"fault": scan}
    with replace_file(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **content)
    return scan, decoded


def _fingerprint(source: Source, gap: Gap) -> str:
    """Hash of everything that a scan depends on."""
    if source.kind == "pictures":
        about = [(path.name, *_stat(path)) for path in list_pictures(source.path)]
        state: Any = hashlib.sha256(repr(about).encode()).hexdigest()
    else:
        state = _stat(source.path)
    about = (source.kind, source.fps, source.column, *((source.inside,) if source.inside else ()), tuple(gap))
    text = repr((_SCHEMA, os.path.abspath(source.path), state, *about))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _stat(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
