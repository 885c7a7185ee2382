"""Parquet files: columns as arrays, pictures in cells, and which row groups to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from .sources import shown

__all__ = ["as_array", "cell_bytes", "path_inside", "require_parquet", "row_groups"]


def require_parquet() -> Any:
    """pyarrow.parquet, or a DatasetError that names the package to install."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError("LeRobot datasets need pyarrow: pip install 'lara-adapter[video]'") from error
    return pyarrow.parquet


def cell_bytes(cell: Any, root: Path) -> bytes:
    """Content of the picture in a cell {"bytes", "path"} of a parquet column; the path is relative to `root`.

    Raises:
        DatasetError: the cell is empty, or its path leads out of the dataset.
        OSError: the file cannot be read.
    """
    cell = cell or {}
    if not cell.get("bytes") and not cell.get("path"):
        raise DatasetError("an empty cell where a picture is expected")
    content: bytes = cell.get("bytes") or (root / path_inside(root, cell["path"])).read_bytes()
    return content


def path_inside(root: Path, path: str) -> str:
    """A path from the dataset's own metadata, which must not lead out of it."""
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DatasetError(f"the metadata of {shown(root)} name the file {path!r} outside of the dataset")
    return path


def row_groups(metadata: Any, episode: int) -> list[int]:
    """The row groups of a parquet file that may hold an episode, by their statistics."""
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        known = next((c.statistics for c in columns if c.path_in_schema == "episode_index"), None)
        if known is None or not known.has_min_max or known.min <= episode <= known.max:
            groups.append(number)
    return groups


def as_array(column: Any) -> np.ndarray:
    """[rows] of a scalar column, [rows, ...] of one of lists of equal length."""
    kind = str(column.type)
    if "list" not in kind and "extension" not in kind:
        flat: np.ndarray = column.to_numpy()
        return flat
    return np.asarray(column.to_pylist())
