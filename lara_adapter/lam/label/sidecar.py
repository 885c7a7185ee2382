"""The sidecar: labels in a parquet file of their own."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...data.dataset import Dataset
from ...data.episodes import Episode, EpisodeDataset
from ...data.parquet import require_parquet
from ...data.sources import shown
from ...errors import DatasetError
from .labels import LabelSet
from .plan import SCHEMA_KEY
from .write import integers, write_tables

__all__ = ["write_sidecar"]


def write_sidecar(labels: LabelSet, source: Dataset, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write one parquet file with a row per frame, atomically; one row group per episode.

    Columns: episode_index, frame_index, index (LeRobot's; of another format the number of the row), episode (its name; not
    with LeRobot), indices, latent, valid, and action where actions are decoded. The provenance is in the schema's metadata
    under "lara_adapter".
    """
    require_parquet()
    import pyarrow as pa

    index_of = _read_indices(source) if isinstance(source, EpisodeDataset) else None
    metadata = {SCHEMA_KEY: json.dumps(provenance, sort_keys=True)}

    def tables() -> Iterator[Any]:
        before = 0
        for number, episode in labels.episodes.items():
            own = labels.of(number)
            length = len(own.valid)
            arrays = {
                "episode_index": pa.array(np.full(length, number, np.int64)),
                "frame_index": pa.array(np.arange(length, dtype=np.int64)),
            }
            if index_of is not None:
                arrays["index"] = pa.array(index_of(episode))
            else:
                arrays["index"] = pa.array(np.arange(before, before + length, dtype=np.int64))
                arrays["episode"] = pa.array([shown(episode.name)] * length, pa.string())
            arrays.update(zip(labels.columns.fields, labels.columns.arrays(own).values()))
            before += length
            yield pa.table(arrays).replace_schema_metadata(metadata)

    write_tables(target, tables())


def _read_indices(source: EpisodeDataset) -> Callable[[Episode], np.ndarray]:
    """The column `index` of an episode, [T] int64; each parquet file is read once for episodes that follow each other."""

    @functools.lru_cache(maxsize=1)
    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            table = require_parquet().read_table(
                source.root / name, columns=["episode_index", "index"], partitioning=None
            )
            numbers, indices = (integers(table.column(column)) for column in ("episode_index", "index"))
        # pyarrow's errors derive from these
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{shown(source.root / name)}: {' '.join(str(error).split())}") from error
        order = np.argsort(numbers, kind="stable")
        return numbers[order], indices[order]

    def of(episode: Episode) -> np.ndarray:
        numbers, indices = read(episode.data)
        start, stop = np.searchsorted(numbers, [episode.number, episode.number + 1])
        return indices[start:stop]

    return of
