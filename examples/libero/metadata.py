"""Paths, tables and statistics of LeRobot's dataset format, versions 3.0 and 2.1, with one file per episode."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.storage.files import replace_file, write_json

CHUNK = 1000  # files per folder
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
GR00T_STATS = ("mean", "std", "min", "max", "q01", "q99")  # GR00T slices every entry by dimension: no count

Stats = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Version and path templates."""

    version: str
    data_path: str
    video_path: str

    def data(self, number: int) -> str:
        """The parquet file of an episode."""
        return self.data_path.format(**self._fields(number))

    def video(self, key: str, number: int) -> str:
        """The video file of an episode's view."""
        return self.video_path.format(video_key=key, **self._fields(number))

    @staticmethod
    def _fields(number: int) -> dict[str, int]:
        chunk, file = divmod(number, CHUNK)
        return {"chunk_index": chunk, "file_index": file, "episode_chunk": chunk, "episode_index": number}


LAYOUTS = {
    "v3.0": Layout(
        "v3.0",
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
    "v2.1": Layout(
        "v2.1",
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
}


def write_columns(path: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write columns [T] and [T, D] as parquet; those of vectors become lists of fixed length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values)
        if values.ndim == 1
        else pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path)


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read columns of vectors, each [T, D]."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(names))
    return {name: np.stack(table.column(name).to_numpy(zero_copy_only=False)) for name in names}


def vector_stats(values: NDArray[np.float32]) -> Stats:
    """Statistics of [T, D] per dimension, under LeRobot's names."""
    values = values.astype(np.float64)
    stats = {name: getattr(values, name)(0).tolist() for name in ("min", "max", "mean", "std")}
    return {
        **stats,
        **{q: np.quantile(values, p, axis=0).tolist() for q, p in QUANTILES.items()},
        "count": [len(values)],
    }


def image_stats(frames: NDArray[np.uint8]) -> Stats:
    """Statistics of frames [T, H, W, 3] per channel, in [0, 1] and of shape [3, 1, 1]; of some 20 of the frames."""
    some = frames[:: max(1, len(frames) // 20)].reshape(-1, 3).astype(np.float32) / 255
    stats = {name: getattr(some, name)(0).reshape(3, 1, 1).tolist() for name in ("min", "max", "mean", "std")}
    return {**stats, "count": [len(frames)]}


def join_stats(parts: Sequence[Stats]) -> Stats:
    """Statistics of several parts together, exact except for quantiles, which are left out."""
    count = np.array([part["count"][0] for part in parts], np.float64)
    mean, std = (np.array([part[name] for part in parts], np.float64) for name in ("mean", "std"))
    weight = (count / count.sum()).reshape(-1, *[1] * (mean.ndim - 1))
    whole = (weight * mean).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0).tolist(),
        "max": np.max([part["max"] for part in parts], axis=0).tolist(),
        "mean": whole.tolist(),
        "std": np.sqrt((weight * (std**2 + (mean - whole) ** 2)).sum(0)).tolist(),
        "count": [int(count.sum())],
    }


def write(
    root: Path, layout: Layout, features: Mapping[str, Any], entries: Sequence[Mapping[str, Any]],
    tasks: Sequence[str], fps: int,
) -> None:  # fmt: skip
    """Write `meta/` of a dataset.

    Args:
        root: folder of the dataset.
        layout: version and paths.
        features: of `meta/info.json`.
        entries: one per episode: `task`, `length` and `stats`.
        tasks: instructions in the order of their index.
        fps: frames per second.
    """
    cameras = [name for name, feature in features.items() if feature["dtype"] == "video"]
    vectors = [name for name in ("observation.state", "action") if name in features]
    parts = [read_columns(root / layout.data(number), vectors) for number in range(len(entries))]
    stats = {name: vector_stats(np.concatenate([part[name] for part in parts])) for name in vectors}
    frames = sum(entry["length"] for entry in entries)
    info = {
        "codebase_version": layout.version, "robot_type": "panda", "fps": fps, "features": dict(features),
        "total_episodes": len(entries), "total_frames": frames, "total_tasks": len(tasks), "chunks_size": CHUNK,
        "splits": {"train": f"0:{len(entries)}"}, "data_path": layout.data_path, "video_path": layout.video_path,
    }  # fmt: skip
    if layout.version == "v3.0":
        stats |= {name: join_stats([entry["stats"][name] for entry in entries]) for name in cameras}
        info |= {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
        _write_v3(root, entries, tasks, cameras, fps)
    else:
        stats = {name: {key: value[key] for key in GR00T_STATS} for name, value in stats.items()}
        videos, chunks = len(entries) * len(cameras), -(-len(entries) // CHUNK)
        info |= {"total_videos": videos, "total_chunks": chunks}
        _write_v2(root, entries, tasks)
    write_json(root / "meta/stats.json", stats)
    write_json(root / "meta/info.json", info)  # last: a reader looks for it first


def _write_v3(
    root: Path, entries: Sequence[Mapping[str, Any]], tasks: Sequence[str], cameras: Sequence[str], fps: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, start = [], 0
    for number, entry in enumerate(entries):
        chunk, file = divmod(number, CHUNK)
        row: dict[str, Any] = {
            "episode_index": number, "tasks": [entry["task"]], "length": entry["length"],
            "data/chunk_index": chunk, "data/file_index": file,
            "dataset_from_index": start, "dataset_to_index": start + entry["length"],
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
        }  # fmt: skip
        for camera in cameras:
            row |= {f"videos/{camera}/chunk_index": chunk, f"videos/{camera}/file_index": file}
            row |= {f"videos/{camera}/from_timestamp": 0.0, f"videos/{camera}/to_timestamp": entry["length"] / fps}
        for name, stats in entry["stats"].items():
            row |= {f"stats/{name}/{key}": value for key, value in stats.items()}
        rows.append(row)
        start += entry["length"]
    with replace_file(root / "meta/episodes/chunk-000/file-000.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    # LeRobot reads it with pandas and looks the instructions up in the index
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, kind, numpy_kind in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0", "columns": columns}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": list(tasks)})
    with replace_file(root / "meta/tasks.parquet") as path:
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _write_v2(root: Path, entries: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    lines = {
        "tasks": [{"task_index": number, "task": task} for number, task in enumerate(tasks)],
        "episodes": [
            {"episode_index": number, "tasks": [entry["task"]], "length": entry["length"]}
            for number, entry in enumerate(entries)
        ],
        "episodes_stats": [
            {"episode_index": number, "stats": entry["stats"]} for number, entry in enumerate(entries)
        ],
    }  # fmt: skip
    for name, content in lines.items():
        with replace_file(root / f"meta/{name}.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
