"""What gives frames in order: a video file, a folder of pictures, an episode of a dataset."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .dataset import Dataset

__all__ = ["PICTURES", "VIDEOS", "Segment", "Source", "list_pictures", "natural_key", "shown"]

VIDEOS = frozenset({".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"})
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


class Segment(NamedTuple):
    """A stretch of a source that pairs may not leave: an episode of a dataset."""

    group: str  # what is held out together: all cameras of one episode
    episode: int  # its number
    start: float  # seconds, inclusive
    stop: float  # seconds, exclusive
    length: int  # frames in it


class Source(NamedTuple):
    """Something that gives frames in order."""

    path: Path  # a file, or a folder of pictures
    kind: str = "video"  # "video"; "pictures": a folder; "episode": the pictures of one episode of a dataset
    segments: tuple[Segment, ...] = ()  # its episodes; none: all of it is one
    fps: float = 30.0  # frames per second of what has no times of its own (pictures)
    column: str = ""  # the camera
    root: Path = Path()  # folder of the dataset that it belongs to, if any
    inside: str = ""  # what of the file, if not all of it: an episode, or a file in an archive
    dataset: Dataset | None = None  # what reads it, for kind "episode" and for what is inside of a file


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts frame_2 before frame_10."""
    parts = re.split(r"([0-9]+)", name)  # not str.isdigit, which holds for "²" as well
    return [(int(part), "") if place % 2 else (-1, part.lower()) for place, part in enumerate(parts) if part]


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order; hidden files do not count."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    names = [name for name in names if os.path.splitext(name)[1].lower() in PICTURES]
    return [folder / name for name in sorted(names, key=natural_key)]


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text for people and JSON: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
