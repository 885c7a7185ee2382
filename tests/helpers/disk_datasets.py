"""Minimal datasets of the LeRobot format, made by hand with PyAV and pyarrow: version 3.0 and 2.1, video and pictures."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, PIXELS, LENGTHS = 10, 32, (14, 9, 20)
CAMERA, WRIST = "observation.images.top", "observation.images.wrist"


def scene(episode: int, length: int = 20, pixels: int = PIXELS) -> tuple[np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3] uint8 of a bright square that walks about, and the steps [T, 2] float32 it takes next."""
    random = np.random.default_rng(episode)
    frames = np.full((length, pixels, pixels, 3), 40, np.uint8)
    size, place = pixels // 4, random.integers(0, pixels * 3 // 4, 2)
    steps = np.zeros((length, 2), np.float32)
    for time in range(length):
        y, x = place
        frames[time, y : y + size, x : x + size] = (230, 200, 60)
        moved = np.clip(place + random.integers(-6, 7, 2), 0, pixels - size)
        steps[time], place = moved - place, moved
    return frames, steps


def write_video(path: Path, frames: np.ndarray, fps: int = FPS, gop: int = 250) -> None:
    """H.264 without loss of its own (4:4:4, quantiser 0); few key frames, so that a reader must decode its way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "0", "g": str(gop), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv444p"
        stream.time_base = Fraction(1, fps)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(picture: np.ndarray) -> bytes:
    memory = io.BytesIO()
    with av.open(memory, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return memory.getvalue()


def make_v3(
    root: Path,
    kind: str = "video",
    lengths=LENGTHS,
    cameras=(CAMERA,),
    per_file: int = 2,
    groups: bool = True,
    pixels=PIXELS,
    shoot=scene,
) -> Path:
    """Version 3.0: `per_file` episodes in one video and one parquet file; one row group per episode, or one for all.

    `shoot(episode, length, pixels)` gives frames and actions.
    """
    rows, episodes, start = _scenes(lengths, cameras, pixels, shoot), [], 0
    for file in range(-(-len(lengths) // per_file)):
        inside = range(file * per_file, min(len(lengths), (file + 1) * per_file))
        tables = [_table(rows[number], number, sum(lengths[:number]), kind, cameras) for number in inside]
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, tables[0].schema, compression="zstd") as writer:
            for table in tables if groups else [pa.concat_tables(tables)]:
                writer.write_table(table)
        for camera in cameras if kind == "video" else ():
            frames = np.concatenate([rows[number]["frames"][camera] for number in inside])
            write_video(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4", frames)
        seconds = 0.0
        for number in inside:
            entry = {
                "episode_index": number, "tasks": ["push"], "length": lengths[number],
                "data/chunk_index": 0, "data/file_index": file,
                "dataset_from_index": start, "dataset_to_index": start + lengths[number],
            }  # fmt: skip
            for camera in cameras if kind == "video" else ():
                entry |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file}
                entry |= {f"videos/{camera}/from_timestamp": seconds}
                entry |= {f"videos/{camera}/to_timestamp": seconds + lengths[number] / FPS}
            for name, value in _stats(rows[number]["action"]).items():
                entry[f"stats/action/{name}"] = value
            episodes.append(entry)
            start, seconds = start + lengths[number], seconds + lengths[number] / FPS
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(episodes), path)
    pq.write_table(pa.table({"task_index": [0], "task": ["push"]}), root / "meta/tasks.parquet")
    _info(
        root, "v3.0", lengths, kind, cameras, pixels,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )  # fmt: skip
    actions = np.concatenate([row["action"] for row in rows])
    (root / "meta/stats.json").write_text(json.dumps({"action": _stats(actions)}))
    return root


def make_v2(root: Path, version: str = "v2.1", lengths=LENGTHS, cameras=(CAMERA,), chunk: int = 2) -> Path:
    """Version 2.1: a video and a parquet file per episode, `chunk` episodes per folder; statistics in a file of lines."""
    rows, lines = _scenes(lengths, cameras, PIXELS, scene), []
    for number in range(len(lengths)):
        folder = f"chunk-{number // chunk:03d}"
        path = root / f"data/{folder}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_table(rows[number], number, sum(lengths[:number]), "video", cameras), path)
        for camera in cameras:
            write_video(root / f"videos/{folder}/{camera}/episode_{number:06d}.mp4", rows[number]["frames"][camera])
        lines.append({"episode_index": number, "tasks": ["push"], "length": lengths[number]})
    _info(
        root, version, lengths, "video", cameras, PIXELS, chunks_size=chunk,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )  # fmt: skip
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "push"}) + "\n")
    if version == "v2.1":
        stats = [
            {
                "episode_index": number,
                "stats": {"action": {k: v for k, v in _stats(row["action"]).items() if k[0] != "q"}},
            }
            for number, row in enumerate(rows)
        ]
        (root / "meta/episodes_stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stats))
    return root


def _scenes(lengths, cameras, pixels, shoot) -> list[dict]:
    rows = []
    for number, length in enumerate(lengths):
        views = {camera: shoot(number + 100 * place, length, pixels) for place, camera in enumerate(cameras)}
        rows.append({"frames": {camera: view[0] for camera, view in views.items()}, "action": views[cameras[0]][1]})
    return rows


def _table(row: dict, number: int, first: int, kind: str, cameras) -> pa.Table:
    length = len(row["action"])
    columns: dict[str, pa.Array] = {}
    if kind == "image":
        for camera in cameras:
            cells = [{"bytes": png(picture), "path": None} for picture in row["frames"][camera]]
            columns[camera] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    columns["action"] = pa.FixedSizeListArray.from_arrays(pa.array(row["action"].reshape(-1)), 2)
    columns["timestamp"] = pa.array((np.arange(length) / FPS).astype(np.float32))
    columns["frame_index"] = pa.array(np.arange(length))
    columns["episode_index"] = pa.array(np.full(length, number))
    columns["index"] = pa.array(first + np.arange(length))
    columns["task_index"] = pa.array(np.zeros(length, np.int64))
    action = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 2, "_type": "List"}
    known = {"info": {"features": {"action": action, "frame_index": {"dtype": "int64", "_type": "Value"}}}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(known), "own": "kept"})


def _stats(values: np.ndarray) -> dict[str, list]:
    basic = {name: getattr(values, name)(0).astype(float).tolist() for name in ("min", "max", "mean", "std")}
    return {**basic, "count": [len(values)], "q01": np.quantile(values, 0.01, axis=0).astype(float).tolist()}


def _info(root, version, lengths, kind, cameras, pixels, **more) -> None:
    (root / "meta").mkdir(parents=True, exist_ok=True)
    features: dict = {
        camera: {"dtype": kind, "shape": [pixels, pixels, 3], "names": ["height", "width", "channels"]}
        for camera in cameras
    }
    features["action"] = {"dtype": "float32", "shape": [2], "names": ["y", "x"]}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": version, "robot_type": "toy", "fps": FPS, "total_episodes": len(lengths),
        "total_frames": sum(lengths), "total_tasks": 1, "chunks_size": 1000, "splits": {"train": f"0:{len(lengths)}"},
        "features": features, **more,
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
