"""Labels into files: new columns of a dataset's parquet files, its metadata, and the sidecar."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.episodes import EpisodeDataset, require_parquet
from ...errors import DatasetError
from ...storage.files import read_json, replace_file, write_json
from .stats import BASIC, aggregate, describe, known_statistics

__all__ = ["LabelColumns", "Labels", "write_data_file", "write_metadata", "write_sidecar"]

PROVENANCE = "meta/lara.json"
SCHEMA_KEY = b"lara_adapter"  # of the parquet files' schema metadata: the provenance as JSON


class Labels(NamedTuple):
    """Labels of one episode of T frames."""

    indices: np.ndarray  # [T, N] int64
    latent: np.ndarray  # [T, N * D], float32 or float16
    valid: np.ndarray  # [T] bool


class LabelColumns:
    """The three new features: their names, types and entries in `meta/info.json`.

    Args:
        prefix: PREFIX.indices, PREFIX.latent and PREFIX.valid are their names.
        queries: N.
        width: D.
        dtype: of the latent, "float32" or "float16".
    """

    def __init__(self, prefix: str, queries: int, width: int, dtype: str) -> None:
        self.names = tuple(f"{prefix}.{field}" for field in Labels._fields)
        tokens = [f"token_{token}" for token in range(queries)]
        numbers = [f"{token}.{number}" for token in tokens for number in range(width)]
        self.features: dict[str, dict[str, Any]] = {
            self.names[0]: {"dtype": "int64", "shape": [queries], "names": tokens},
            self.names[1]: {"dtype": dtype, "shape": [queries * width], "names": numbers},
            self.names[2]: {"dtype": "bool", "shape": [1], "names": None},
        }

    def arrays(self, labels: Labels) -> dict[str, Any]:
        """Name -> arrow array; lists of fixed length, as LeRobot writes them, or plain numbers where that is 1."""
        import pyarrow as pa

        made = {}
        for name, values in zip(self.names, labels):
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            size = self.features[name]["shape"][0]
            made[name] = flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
        return made

    def huggingface(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The same in the words of the datasets library, in the dialect (List or Sequence) of the `known` features."""
        kinds = [entry.get("_type") for entry in known.values() if isinstance(entry, dict)]
        made: dict[str, Any] = {}
        for name, feature in self.features.items():
            value = {"dtype": feature["dtype"], "_type": "Value"}
            size = feature["shape"][0]
            kind = "List" if "List" in kinds else "Sequence"
            made[name] = value if size == 1 else {"feature": value, "length": size, "_type": kind}
        return made


def write_data_file(
    source: Path,
    target: Path,
    columns: LabelColumns,
    get_labels: Callable[[int], Labels],
    provenance: Mapping[str, Any],
) -> None:
    """Copy a parquet file of frames with the new columns; row groups, compression and all other columns stay.

    Args:
        source: file with the columns episode_index and frame_index.
        target: file to write, atomically.
        columns: what to add.
        get_labels: labels of an episode, by its number.
        provenance: for the schema's metadata.

    Raises:
        DatasetError: it holds a frame that its dataset's metadata do not know, or cannot be read.
    """
    parquet = require_parquet()
    try:
        with parquet.ParquetFile(source) as file, replace_file(target) as fresh:
            writer = None
            try:
                for number in range(file.num_row_groups):
                    table = file.read_row_group(number)
                    labels = _row_labels(source, table, get_labels)
                    for name, array in columns.arrays(labels).items():
                        table = table.append_column(name, array)
                    table = table.replace_schema_metadata(_schema_metadata(file.schema_arrow, columns, provenance))
                    if writer is None:
                        compression = file.metadata.row_group(0).column(0).compression.lower()
                        writer = parquet.ParquetWriter(
                            fresh, table.schema, compression="none" if compression == "uncompressed" else compression
                        )
                    writer.write_table(table, row_group_size=max(1, table.num_rows))
            finally:
                if writer is not None:
                    writer.close()
            if writer is None:
                raise DatasetError(f"{source} holds no frames")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{source}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def write_metadata(
    dataset: EpisodeDataset,
    target: Path,
    columns: LabelColumns,
    get_labels: Callable[[int], Labels],
    provenance: dict[str, Any],
) -> list[str]:
    """Write `meta/info.json`, the statistics and `meta/lara.json` of the labelled copy.

    Statistics are over every frame, those with valid False too, as LeRobot computes its own.

    Args:
        dataset: the source.
        target: folder of the copy.
        columns: the new features.
        get_labels: labels of an episode, by its number.
        provenance: what `meta/lara.json` says.

    Returns:
        What was written, relative to `target`.
    """
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
    found: dict[int, dict[str, dict[str, list[float]]]] = {}
    for episode in dataset.episodes:
        found[episode.number] = {
            name: describe(values, kinds) for name, values in zip(columns.names, get_labels(episode.number))
        }
    if whole is not None:
        total = {name: aggregate([stats[name] for stats in found.values()], whole_kinds) for name in columns.names}
        _write_plain(target / "meta/stats.json", {**whole, **total})
        written.append("meta/stats.json")
    if (meta / "episodes_stats.jsonl").is_file():
        with replace_file(target / "meta/episodes_stats.jsonl") as fresh:
            fresh.write_text(
                "".join(_extended_lines(meta / "episodes_stats.jsonl", found, in_episodes)), encoding="utf-8"
            )
        written.append("meta/episodes_stats.jsonl")
    for path in sorted((meta / "episodes").glob("*/*.parquet")) if in_episodes else ():
        name = path.relative_to(dataset.root).as_posix()
        _write_episodes(path, target / name, found, in_episodes)
        written.append(name)
    return written


def write_sidecar(
    dataset: EpisodeDataset,
    target: Path,
    columns: LabelColumns,
    get_labels: Callable[[int], Labels],
    provenance: dict[str, Any],
) -> None:
    """Write one parquet file with a row per frame, atomically: episode_index, frame_index, index, indices, latent, valid.

    One row group per episode; the provenance is in the schema's metadata under "lara_adapter".
    """
    import pyarrow as pa

    parquet = require_parquet()
    with replace_file(target) as fresh:
        writer = None
        try:
            for episode in dataset.episodes:
                keys = {
                    "episode_index": np.full(episode.length, episode.number),
                    "frame_index": np.arange(episode.length),
                }
                keys["index"] = dataset.rows(episode, ["index"])["index"]
                arrays = {name: pa.array(values.astype(np.int64)) for name, values in keys.items()}
                labels = columns.arrays(get_labels(episode.number))
                arrays.update(zip(Labels._fields, labels.values()))
                table = pa.table(arrays).replace_schema_metadata({SCHEMA_KEY: json.dumps(provenance, sort_keys=True)})
                writer = writer or parquet.ParquetWriter(fresh, table.schema)
                writer.write_table(table, row_group_size=max(1, episode.length))
        finally:
            if writer is not None:
                writer.close()


def _row_labels(source: Path, table: Any, get_labels: Callable[[int], Labels]) -> Labels:
    """Labels of the rows of a table, whatever episodes they are of."""
    episodes, frames = (table.column(name).to_numpy() for name in ("episode_index", "frame_index"))
    starts = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
    parts = []
    for start, stop in itertools.pairwise(starts):
        labels, places = get_labels(int(episodes[start])), frames[start:stop]
        if places.min() < 0 or places.max() >= len(labels.valid):
            raise DatasetError(
                f"{source} holds frame {places.max()} of episode {episodes[start]}, which has {len(labels.valid)} frames"
            )
        parts.append([values[places] for values in labels])
    return Labels(*(np.concatenate(values) for values in zip(*parts)))


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
        names |= {
            name.rpartition("/")[2] for name in require_parquet().read_schema(path).names if name.startswith("stats/")
        }
    if (meta / "episodes_stats.jsonl").is_file():
        with (meta / "episodes_stats.jsonl").open(encoding="utf-8") as file:
            stats = json.loads(file.readline() or "{}").get("stats", {})
        names |= {kind for feature in stats.values() for kind in feature}
    return known_statistics(names) if names else []


def _extended_lines(path: Path, found: Mapping[int, Mapping[str, Any]], kinds: list[str]) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, stats in found[int(entry["episode_index"])].items():
            entry["stats"][name] = {kind: stats[kind] for kind in kinds}
        yield json.dumps(entry) + "\n"


def _write_episodes(path: Path, target: Path, found: Mapping[int, Mapping[str, Any]], kinds: list[str]) -> None:
    """Copy a parquet file of episodes with the statistics of the new features."""
    import pyarrow as pa

    parquet = require_parquet()
    table = parquet.read_table(path)
    numbers = table.column("episode_index").to_pylist()
    for name in next(iter(found.values())):
        for kind in kinds:
            values = pa.array(
                [found[number][name][kind] for number in numbers],
                pa.list_(pa.int64() if kind == "count" else pa.float64()),
            )
            table = table.append_column(f"stats/{name}/{kind}", values)
    # the datasets library infers the types of all columns where it finds no description of its own
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
    with replace_file(target) as fresh:
        parquet.write_table(table.replace_schema_metadata(metadata or None), fresh)


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    with replace_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
