"""Labels into files: new columns of a dataset's parquet files, its metadata, and the sidecar."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...data.episodes import EpisodeDataset, require_parquet
from ...errors import DatasetError
from ...storage.files import read_json, replace_file, write_json
from .labels import LabelColumns, Labels, LabelSet
from .stats import BASIC, Stats, aggregate, describe, known_statistics

__all__ = ["write_data_file", "write_metadata", "write_sidecar"]

PROVENANCE = "meta/lara.json"
SCHEMA_KEY = b"lara_adapter"  # of the parquet files' schema metadata: the provenance as JSON


def write_data_file(labels: LabelSet, source: Path, target: Path, provenance: Mapping[str, Any]) -> None:
    """Copy a parquet file of frames with the new columns; row groups, compression and all other columns stay.

    Raises:
        DatasetError: it holds a frame that its dataset's metadata do not know, or cannot be read.
    """
    try:
        with require_parquet().ParquetFile(source) as file:
            if not file.num_row_groups:
                raise DatasetError(f"{source} holds no frames")
            compression = file.metadata.row_group(0).column(0).compression.lower()
            metadata = _schema_metadata(file.schema_arrow, labels.columns, provenance)
            tables = (
                _labelled(source, file.read_row_group(number), labels).replace_schema_metadata(metadata)
                for number in range(file.num_row_groups)
            )
            _write_tables(target, tables, "none" if compression == "uncompressed" else compression)
    except DatasetError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{source}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def write_metadata(labels: LabelSet, target: Path, provenance: dict[str, Any]) -> list[str]:
    """Write `meta/info.json`, the statistics and `meta/lara.json` of the labelled copy in the folder `target`.

    Statistics are over every frame, those with valid False too, as LeRobot computes its own.

    Returns:
        What was written, relative to `target`.
    """
    dataset, columns = labels.dataset, labels.columns
    meta = dataset.root / "meta"
    write_json(target / PROVENANCE, provenance)
    # not through write_json: LeRobot keeps the features in order
    _write_plain(target / "meta/info.json", {**dataset.info, "features": {**dataset.features, **columns.features}})
    written = [PROVENANCE, "meta/info.json"]
    whole = read_json(meta / "stats.json") if (meta / "stats.json").is_file() else None
    in_episodes = _episode_statistics(dataset)
    whole_kinds = known_statistics(
        {kind for stats in (whole or {}).values() if isinstance(stats, dict) for kind in stats}
    )
    kinds = sorted({*BASIC, *in_episodes, *whole_kinds})
    found = {
        episode.number: {
            name: describe(values, kinds) for name, values in zip(columns.names, labels.get(episode.number))
        }
        for episode in dataset.episodes
    }
    if whole is not None:
        total = {name: aggregate([stats[name] for stats in found.values()], whole_kinds) for name in columns.names}
        _write_plain(target / "meta/stats.json", {**whole, **total})
        written.append("meta/stats.json")
    if (meta / "episodes_stats.jsonl").is_file():
        lines = "".join(_extended_lines(meta / "episodes_stats.jsonl", found, in_episodes))
        with replace_file(target / "meta/episodes_stats.jsonl") as fresh:
            fresh.write_text(lines, encoding="utf-8")
        written.append("meta/episodes_stats.jsonl")
    for path in sorted((meta / "episodes").glob("*/*.parquet")) if in_episodes else ():
        name = path.relative_to(dataset.root).as_posix()
        _write_episodes(path, target / name, found, in_episodes)
        written.append(name)
    return written


def write_sidecar(labels: LabelSet, target: Path, provenance: dict[str, Any]) -> None:
    """Write one parquet file with a row per frame, atomically: episode_index, frame_index, index, indices, latent, valid.

    One row group per episode; the provenance is in the schema's metadata under "lara_adapter".
    """
    import pyarrow as pa

    def tables() -> Iterator[Any]:
        for episode in labels.dataset.episodes:
            keys = {
                "episode_index": np.full(episode.length, episode.number),
                "frame_index": np.arange(episode.length),
                **labels.dataset.rows(episode, ["index"]),
            }
            arrays = {name: pa.array(values.astype(np.int64)) for name, values in keys.items()}
            arrays.update(zip(Labels._fields, labels.columns.arrays(labels.get(episode.number)).values()))
            yield pa.table(arrays).replace_schema_metadata({SCHEMA_KEY: json.dumps(provenance, sort_keys=True)})

    _write_tables(target, tables())


def _write_tables(target: Path, tables: Iterable[Any], compression: str = "snappy") -> None:
    """Write tables of one schema as the row groups of a parquet file, atomically."""
    with replace_file(target) as fresh, contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                writer = require_parquet().ParquetWriter(fresh, table.schema, compression=compression)
                stack.enter_context(writer)
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def _labelled(source: Path, table: Any, labels: LabelSet) -> Any:
    """A table of frames with the new columns, whatever episodes its rows are of."""
    episodes, frames = (table.column(name).to_numpy() for name in ("episode_index", "frame_index"))
    starts = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
    parts = []
    for start, stop in itertools.pairwise(starts):
        episode, places = labels.get(int(episodes[start])), frames[start:stop]
        if places.min() < 0 or places.max() >= len(episode.valid):
            raise DatasetError(
                f"{source} holds frame {places.max()} of episode {episodes[start]}, which has {len(episode.valid)} frames"
            )
        parts.append([values[places] for values in episode])
    rows = Labels(*(np.concatenate(values) for values in zip(*parts)))
    for name, array in labels.columns.arrays(rows).items():
        table = table.append_column(name, array)
    return table


def _schema_metadata(schema: Any, columns: LabelColumns, provenance: Mapping[str, Any]) -> dict[bytes, bytes]:
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        content = json.loads(metadata[b"huggingface"])
        known = content.get("info", {}).get("features")
        if isinstance(known, dict):
            known.update(columns.huggingface(known))
            metadata[b"huggingface"] = json.dumps(content).encode()
    metadata[SCHEMA_KEY] = json.dumps(provenance, sort_keys=True).encode()
    return metadata


def _episode_statistics(dataset: EpisodeDataset) -> list[str]:
    """Which statistics the dataset keeps per episode; empty: none."""
    meta = dataset.root / "meta"
    names: set[str] = set()
    for path in sorted((meta / "episodes").glob("*/*.parquet"))[:1]:
        columns = require_parquet().read_schema(path).names
        names |= {name.rpartition("/")[2] for name in columns if name.startswith("stats/")}
    if (meta / "episodes_stats.jsonl").is_file():
        with (meta / "episodes_stats.jsonl").open(encoding="utf-8") as file:
            stats = json.loads(file.readline() or "{}").get("stats", {})
        names |= {kind for feature in stats.values() for kind in feature}
    return known_statistics(names) if names else []


def _extended_lines(path: Path, found: Mapping[int, Mapping[str, Stats]], kinds: list[str]) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, stats in found[int(entry["episode_index"])].items():
            entry["stats"][name] = {kind: stats[kind] for kind in kinds}
        yield json.dumps(entry) + "\n"


def _write_episodes(path: Path, target: Path, found: Mapping[int, Mapping[str, Stats]], kinds: list[str]) -> None:
    """Copy a parquet file of episodes with the statistics of the new features."""
    import pyarrow as pa

    parquet = require_parquet()
    table = parquet.read_table(path)
    numbers = table.column("episode_index").to_pylist()
    for name, kind in itertools.product(next(iter(found.values())), kinds):
        values = [found[number][name][kind] for number in numbers]
        numeric = pa.list_(pa.int64() if kind == "count" else pa.float64())
        table = table.append_column(f"stats/{name}/{kind}", pa.array(values, numeric))
    # the datasets library infers the types of all columns where it finds no description of its own
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
    with replace_file(target) as fresh:
        parquet.write_table(table.replace_schema_metadata(metadata or None), fresh)


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    with replace_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
