"""Pictures in a dataset of an HDF5 file: which datasets are cameras, and their frames in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import DatasetError
from .dataset import Content

__all__ = ["DAMAGE", "error_text", "kind_of", "read_rows", "require_h5py"]

# what h5py raises for a damaged file
DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)

_PICTURE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # JPEG, PNG
_BLOCK = 4 << 20  # bytes read at once
_ROWS = 64  # frames read at once


def require_h5py() -> Any:
    """h5py, or a DatasetError that names the package to install."""
    try:
        import h5py
    except ImportError as error:
        raise DatasetError(f"HDF5 files need h5py: pip install 'lara-adapter[hdf5]' ({error})") from error
    return h5py


def kind_of(name: str, dataset: Any) -> str:
    """What a dataset holds: "rgb", "encoded" (a JPEG or PNG file per frame), "depth" (or whatever is not RGB), or ""."""
    h5py, shape, dtype = require_h5py(), dataset.shape, dataset.dtype
    if name.endswith("_depth"):
        return "depth"
    if dtype == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[3]):
        return "rgb"
    if len(shape) > 2:
        return "depth" if min(shape[1:3]) >= 16 else ""
    whole = h5py.check_vlen_dtype(dtype) == np.uint8 or h5py.check_string_dtype(dtype) or dtype.kind in "SV"
    if (whole and len(shape) == 1) or (dtype == np.uint8 and len(shape) == 2):
        return "encoded" if _as_bytes(dataset[0]).startswith(_PICTURE_STARTS) else ""
    return ""


def read_rows(name: str, dataset: Any, places: Sequence[int] | None) -> Iterator[Content]:
    """Frames of a camera: RGB [H, W, 3] uint8, or the content of picture files.

    Args:
        name: the camera.
        dataset: [T, H, W, 3] or [T, 3, H, W] uint8, or [T] files.
        places: numbers of frames, rising; None: all.

    Raises:
        ValueError: some cannot be read; it says which.
    """
    encoded = kind_of(name, dataset) == "encoded"
    planes_first = not encoded and dataset.shape[3] != 3
    step = _rows_at_once(dataset, everything=places is None)
    for _, group in groupby(range(len(dataset)) if places is None else places, lambda place: place // step):
        inside = list(group)
        try:
            rows = dataset[inside[0] : inside[-1] + 1]
        except DAMAGE as error:
            raise ValueError(f"frames {inside[0]} to {inside[-1]}: {error_text(error)}") from error
        for place in inside:
            row = rows[place - inside[0]]
            if encoded:
                yield _as_bytes(row)
            else:  # a copy, or one frame would keep the whole block
                yield np.array(row.transpose(1, 2, 0) if planes_first else row, order="C")


def _rows_at_once(dataset: Any, everything: bool) -> int:
    """Whole chunks, which are decompressed as a whole; of all frames some more, up to about 4 MB."""
    chunk: int = dataset.chunks[0] if dataset.chunks else 1
    if not everything:
        return chunk
    size = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
    return chunk * max(1, min(_ROWS, _BLOCK // max(1, size)) // chunk)


def _as_bytes(row: Any) -> bytes:
    return row.tobytes() if isinstance(row, (np.ndarray, np.void)) else bytes(row)


def error_text(error: Exception) -> str:
    """The message of an error on one line, with its type where that says something."""
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"
