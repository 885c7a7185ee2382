"""Where video is found: files, folders of pictures, and LeRobot datasets."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import LaraArgumentError
from .episodes import INFO, EpisodeDataset

__all__ = ["PICTURES", "VIDEOS", "Segment", "Source", "find_sources", "list_pictures", "natural_key"]

VIDEOS = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


class Segment(NamedTuple):
    """A stretch of a source that pairs may not leave: an episode of a LeRobot dataset."""

    group: str  # what is held out together: all cameras of one episode
    episode: int  # its number
    start: float  # seconds, inclusive
    stop: float  # seconds, exclusive
    length: int  # frames in it


class Source(NamedTuple):
    """Something that gives frames in order."""

    path: Path  # a video file, a folder of pictures, or a parquet file with pictures in a column
    kind: str = "video"  # "video", "pictures" or "parquet"
    segments: tuple[Segment, ...] = ()  # its episodes; none: all of it is one
    fps: float = 30.0  # frames per second of what has no times of its own (pictures, parquet)
    column: str = ""  # that of a parquet file
    root: Path = Path()  # folder of the LeRobot dataset that it belongs to, if any


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"([0-9]+)", name) if part]


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order; hidden files do not count."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    names = [name for name in names if os.path.splitext(name)[1].lower() in PICTURES]
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
        LaraArgumentError: a folder does not exist, or a dataset has no camera of these names.
        DatasetError: the metadata of a LeRobot dataset are damaged.
    """
    sources: list[Source] = []
    visited: set[str] = set()
    for folder in map(Path, folders):
        if folder.is_file():
            sources.append(Source(folder))
        elif folder.is_dir():
            sources.extend(_below(folder, cameras, picture_fps, visited))
        else:
            raise LaraArgumentError(f"{folder} does not exist; a folder of videos (or a video file) is expected")
    return sources


def _below(folder: Path, cameras: Sequence[str], fps: float, visited: set[str]) -> Iterator[Source]:
    """The sources of one folder tree."""
    real = os.path.realpath(folder)
    if real in visited:  # links can lead in a circle
        return
    visited.add(real)
    if (folder / INFO).is_file():
        yield from _dataset_sources(folder, cameras)
        return
    entries = sorted((entry for entry in folder.iterdir() if entry.name[0] != "."), key=lambda e: natural_key(e.name))
    if len(list_pictures(folder)) > 1:
        yield Source(folder, "pictures", fps=fps)
    for entry in entries:
        if entry.suffix.lower() in VIDEOS and not entry.is_dir():
            yield Source(entry)
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry, cameras, fps, visited)


def _dataset_sources(root: Path, cameras: Sequence[str]) -> Iterator[Source]:
    """The files of a LeRobot dataset, for each camera, with the episodes that each holds."""
    dataset = EpisodeDataset(root)
    for key in dataset.select_cameras(cameras):
        is_video = dataset.features[key]["dtype"] == "video"
        segments: dict[str, list[Segment]] = {}
        rows: Counter[str] = Counter()  # in each parquet file, of the episodes before
        for episode in dataset.episodes:
            name, start = episode.videos[key] if is_video else (episode.data, rows[episode.data] / dataset.fps)
            rows[episode.data] += episode.length
            stop = start + episode.length / dataset.fps
            segment = Segment(f"{root}#{episode.number}", episode.number, start, stop, episode.length)
            segments.setdefault(name, []).append(segment)
        for name, inside in segments.items():
            kind, column = ("video", "") if is_video else ("parquet", key)
            yield Source(root / name, kind, tuple(inside), dataset.fps, column, root)
