"""Labels into the parquet files of a dataset's frames: new columns, all else as it was."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...data.parquet import require_parquet
from ...data.sources import shown
from ...errors import DatasetError
from ...storage.files import replace_file
from .labels import LabelColumns, LabelSet
from .plan import SCHEMA_KEY

__all__ = ["integers", "write_data_file", "write_tables"]

_CODECS = ("snappy", "gzip", "brotli", "lz4", "zstd")


def write_data_file(labels: LabelSet, source: Path, target: Path, provenance: Mapping[str, Any]) -> set[int]:
    """Copy a parquet file of frames with the new columns; row groups, compression and all other columns stay.

    Rows of episodes without labels get zeros, and valid False.

    Returns:
        The episodes of such rows.

    Raises:
        DatasetError: the file cannot be read.
    """
    import pyarrow as pa

    without: set[int] = set()
    try:
        with require_parquet().ParquetFile(source) as file:
            metadata = _schema_metadata(file.schema_arrow, labels.columns, provenance)
            groups = map(file.read_row_group, range(file.num_row_groups))
            empty = [] if file.num_row_groups else [file.schema_arrow.empty_table()]
            tables = (
                _labelled(table, labels, without).replace_schema_metadata(metadata)
                for table in itertools.chain(groups, empty)
            )
            write_tables(target, tables, _compression(file))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{shown(source)}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return without


def write_tables(target: Path, tables: Iterable[Any], compression: str = "snappy") -> None:
    """Write tables of one schema as the row groups of a parquet file, atomically."""
    with replace_file(target) as fresh, contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                writer = require_parquet().ParquetWriter(fresh, table.schema, compression=compression)
                stack.enter_context(writer)
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def _compression(file: Any) -> str:
    """That of a parquet file; snappy where it cannot be written."""
    metadata = file.metadata
    if not metadata.num_row_groups:
        return "snappy"
    name = metadata.row_group(0).column(0).compression.lower().removesuffix("_raw")
    return "none" if name == "uncompressed" else name if name in _CODECS else "snappy"


def _labelled(table: Any, labels: LabelSet, without: set[int]) -> Any:
    """A table of frames with the new columns, whatever episodes its rows are of; adds to `without`."""
    episodes, frames = (integers(table.column(name)) for name in ("episode_index", "frame_index"))
    rows = labels.columns.zeros(len(episodes))
    changes = np.flatnonzero(np.diff(episodes)) + 1
    for start, stop in itertools.pairwise([0, *changes.tolist(), len(episodes)]) if len(episodes) else ():
        own = labels.get(int(episodes[start]))
        places = frames[start:stop]
        inside = (places >= 0) & (places < (0 if own is None else len(own.valid)))
        if not inside.all():
            without.add(int(episodes[start]))
        if own is not None:
            values = labels.columns.named(own)
            for name, column in labels.columns.named(rows).items():
                column[start:stop][inside] = values[name][places[inside]]
    for name, array in labels.columns.arrays(rows).items():
        table = table.append_column(name, array)
    return table


def integers(column: Any) -> np.ndarray:
    """[rows] int64, -1 for an empty cell."""
    import pyarrow as pa

    values: np.ndarray = column.cast(pa.int64()).fill_null(-1).to_numpy()
    return values


def _schema_metadata(schema: Any, columns: LabelColumns, provenance: Mapping[str, Any]) -> dict[bytes, bytes]:
    metadata = dict(schema.metadata or {})
    with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):  # none, or not the datasets library's
        content = json.loads(metadata[b"huggingface"])
        known = content["info"]["features"]
        known.update(columns.huggingface(known))
        metadata[b"huggingface"] = json.dumps(content).encode()
    metadata[SCHEMA_KEY] = json.dumps(provenance, sort_keys=True).encode()
    return metadata
