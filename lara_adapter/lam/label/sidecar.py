"""The sidecar: labels in a parquet file of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...data.dataset import Dataset
from ...data.episodes import EpisodeDataset
from ...data.parquet import require_parquet
from ...data.sources import shown
from .labels import Labels, LabelSet
from .plan import SCHEMA_KEY
from .write import write_tables

__all__ = ["write_sidecar"]


def write_sidecar(labels: LabelSet, source: Dataset, target: Path, provenance: Mapping[str, Any]) -> None:
    """Write one parquet file with a row per frame, atomically; one row group per episode.

    Columns: episode_index, frame_index, index (LeRobot's; of another format the number of the row), episode (its name; not
    with LeRobot), indices, latent, valid. The provenance is in the schema's metadata under "lara_adapter".
    """
    require_parquet()
    import pyarrow as pa

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
            if isinstance(source, EpisodeDataset):
                arrays["index"] = pa.array(source.rows(episode, ["index"])["index"].astype(np.int64))
            else:
                arrays["index"] = pa.array(np.arange(before, before + length, dtype=np.int64))
                arrays["episode"] = pa.array([shown(episode.name)] * length, pa.string())
            arrays.update(zip(Labels._fields, labels.columns.arrays(own).values()))
            before += length
            yield pa.table(arrays).replace_schema_metadata(metadata)

    write_tables(target, tables())
