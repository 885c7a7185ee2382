"""Where video is found: files, folders of pictures, and LeRobot datasets, which are read from their files alone."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import AdapterFormatError, LaraArgumentError
from ..storage.files import read_json
from .episodes import require_parquet

__all__ = ["PICTURES", "VIDEOS", "Segment", "Source", "find_sources", "natural_key", "pictures_of"]

logger = logging.getLogger(__name__)

VIDEOS = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


class Segment(NamedTuple):
    """A stretch of a source that pairs may not leave: an episode.

    group: what is held out together, for instance all cameras of one episode.
    start: seconds, inclusive.
    stop: seconds, exclusive.
    """

    group: str
    start: float
    stop: float


class Source(NamedTuple):
    """Something that gives frames in order.

    path: a video file, a folder of pictures, or a parquet file with pictures in a column.
    kind: "video", "pictures" or "parquet".
    segments: its episodes; none: all of it is one.
    fps: frames per second of what has no times of its own (pictures, parquet).
    column: that of a parquet file.
    """

    path: Path
    kind: str = "video"
    segments: tuple[Segment, ...] = ()
    fps: float = 30.0
    column: str = ""


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"([0-9]+)", name) if part]


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order; hidden files do not count."""
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in PICTURES and not entry.name.startswith(".")
        ]
    return [folder / name for name in sorted(names, key=natural_key)]


def find_sources(
    folders: Sequence[str | os.PathLike[str]], *, cameras: Sequence[str] = (), picture_fps: float = 30.0
) -> list[Source]:
    """Find everything below some folders that gives frames.

    A folder with `meta/info.json` is a LeRobot dataset (layouts v2.0 to v3.0), and one that directly holds two pictures
    or more is one image sequence. Links are followed, hidden folders are not.

    Args:
        folders: folders, or single video files.
        cameras: names of the cameras to take from LeRobot datasets, with or without `observation.images.`; empty: all.
        picture_fps: frames per second of image sequences.

    Returns:
        The sources in an order that does not depend on the file system.

    Raises:
        LaraArgumentError: a folder does not exist, or no dataset has a camera of that name.
        AdapterFormatError: the files of a LeRobot dataset are damaged.
    """
    found: list[Source] = []
    seen: set[str] = set()
    for folder in map(Path, folders):
        if folder.is_file():
            found.append(Source(folder))
        elif folder.is_dir():
            found.extend(_below(folder, cameras, picture_fps, seen))
        else:
            raise LaraArgumentError(f"{folder} does not exist; a folder of videos (or a video file) is expected")
    return found


def _below(folder: Path, cameras: Sequence[str], fps: float, seen: set[str]) -> Iterator[Source]:
    """The sources of one folder tree."""
    real = os.path.realpath(folder)
    if real in seen:  # links can lead in a circle
        return
    seen.add(real)
    if (folder / "meta" / "info.json").is_file():
        yield from _dataset(folder, cameras)
        return
    entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=lambda e: natural_key(e.name))
    if len(pictures_of(folder)) > 1:
        yield Source(folder, "pictures", fps=fps)
    for entry in entries:
        if entry.suffix.lower() in VIDEOS and not entry.is_dir():
            yield Source(entry)
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry, cameras, fps, seen)


# ---------------------------------------------------------------------- LeRobot datasets


def _dataset(root: Path, cameras: Sequence[str]) -> Iterator[Source]:
    """The sources of a LeRobot dataset: for each camera its files, with the episodes that each holds."""
    info = read_json(root / "meta" / "info.json")
    try:
        features = {name: feature["dtype"] for name, feature in info["features"].items()}
        fps, version = float(info["fps"]), str(info.get("codebase_version", ""))
        have = [name for name, dtype in features.items() if dtype in ("video", "image")]
        keys = _choose(root, have, cameras)
        episodes = _episodes_v3(root) if version.startswith("v3") else _episodes_v2(root, info)
        for key in keys:
            files: dict[str, list[Segment]] = {}
            for episode in episodes:
                name, segment = _place(root, info, key, features[key], episode, fps)
                files.setdefault(name, []).append(segment)
            kind = "video" if features[key] == "video" else "parquet"
            for name, segments in files.items():
                yield Source(root / name, kind, tuple(segments), fps, key if kind == "parquet" else "")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, (LaraArgumentError, AdapterFormatError)):
            raise
        raise AdapterFormatError(
            f"{root / 'meta'}: the dataset's description is damaged or of an unknown layout "
            f"({type(error).__name__}: {error}); layouts v2.0 to v3.0 are read"
        ) from error


def _choose(root: Path, have: list[str], cameras: Sequence[str]) -> list[str]:
    if not cameras:
        return have
    chosen = [key for key in have if key in cameras or key.removeprefix("observation.images.") in cameras]
    if not chosen:
        raise LaraArgumentError(f"cameras={list(cameras)}: the dataset {root} has none of them, but {have}")
    return chosen


def _place(
    root: Path, info: dict[str, Any], key: str, dtype: str, episode: dict[str, Any], fps: float
) -> tuple[str, Segment]:
    """The file, relative to the dataset, and the stretch of it that holds one episode for one camera."""
    number = int(episode["episode_index"])
    group = f"{root}#{number}"
    parts: dict[str, Any] = {"video_key": key, "episode_index": number}
    start, stop = 0.0, float("inf")
    owner = f"videos/{key}" if dtype == "video" else "data"
    if f"{owner}/chunk_index" in episode:
        parts |= {name: int(episode[f"{owner}/{name}"]) for name in ("chunk_index", "file_index")}
        if dtype == "video":
            start, stop = (float(episode[f"{owner}/{end}_timestamp"]) for end in ("from", "to"))
        else:
            start, stop = episode["first_row"] / fps, (episode["first_row"] + int(episode["length"])) / fps
    else:
        parts["episode_chunk"] = number // int(info.get("chunks_size", 1000))
    name = str(info["video_path" if dtype == "video" else "data_path"]).format(**parts)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise AdapterFormatError(f"{root / 'meta' / 'info.json'}: the path {name} leads out of the dataset")
    return name, Segment(group, start, stop)


def _episodes_v2(root: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    path = root / "meta" / "episodes.jsonl"
    if path.is_file():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"episode_index": number} for number in range(int(info["total_episodes"]))]


def _episodes_v3(root: Path) -> list[dict[str, Any]]:
    """One row for each episode, `first_row` added: where it starts in its data file."""
    pq = require_parquet()
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for path in sorted((root / "meta" / "episodes").glob("**/*.parquet")):
        try:
            file = pq.ParquetFile(path)
            # statistics make up most of the table
            names = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
            rows.extend(file.read(columns=names).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise AdapterFormatError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not rows:
        raise AdapterFormatError(f"{root / 'meta' / 'episodes'} holds no episode")
    rows.sort(key=lambda row: int(row["episode_index"]))
    starts: dict[tuple[int, int], int] = {}
    for row in rows:
        file_of = int(row.get("data/chunk_index", 0)), int(row.get("data/file_index", 0))
        row["first_row"] = starts.get(file_of, 0)
        starts[file_of] = row["first_row"] + int(row["length"])
    return rows
