"""Videos and datasets as clips: something with frames to look at, whatever it lies in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DatasetError
from .decode import SequentialVideo
from .episodes import INFO, Episode, EpisodeDataset

__all__ = ["VIDEO_SUFFIXES", "Clip", "ClipSource", "pick_frames"]

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")


class Clip(NamedTuple):
    """One episode of a dataset, or one video file.

    name: "episode 3", or the file's name, with the folders below the one that was given.
    length: frames; for a video what its header says, or an estimate.
    part: the episode, or the file.
    """

    name: str
    length: int
    part: Episode | Path


class ClipSource:
    """A dataset of the LeRobot format, a folder of videos (searched below too), or one video.

    Args:
        source: folder, file, or Hub id of a dataset.
        camera: of a dataset; None: the only one.
        revision: of a dataset on the Hub.

    Attributes:
        name: of the folder or file, or the Hub id.
        dataset: the dataset, None for videos.
        camera: its camera, None for videos.
        fps: frames per second; of the first video.
        clips: what there is; a video that cannot be opened is left out with a warning.

    Raises:
        DatasetError: there is nothing that can be read.
        LaraArgumentError: no such camera.
    """

    def __init__(self, source: str | os.PathLike[str], camera: str | None = None, revision: str | None = None) -> None:
        path = Path(source)
        self.dataset: EpisodeDataset | None = None
        self.camera: str | None = None
        if path.is_file() or (path.is_dir() and not (path / INFO).is_file()):
            self.name = path.resolve().name
            files = [path] if path.is_file() else _videos_below(path)
            self.clips, rates = _open_all(files, path.parent if path.is_file() else path)
            if not self.clips:
                raise DatasetError(
                    f"{path} holds neither {INFO} (a LeRobot dataset) nor a video that can be read: "
                    f"{', '.join(VIDEO_SUFFIXES)}"
                )
            self.fps = rates[0]
            return
        self.dataset = EpisodeDataset(source, revision)
        self.camera = self.dataset.camera(camera)
        self.name, self.fps = self.dataset.name, self.dataset.fps
        self.clips = [Clip(f"episode {episode.number}", episode.length, episode) for episode in self.dataset.episodes]

    def frames(self, clip: Clip) -> Iterator[np.ndarray]:
        """The frames of a clip, [H, W, 3] uint8, in order.

        Raises:
            DatasetError: the file is damaged or ends early.
        """
        if isinstance(clip.part, Path):
            with SequentialVideo(clip.part) as video:
                yield from video.all_frames()
            return
        assert self.dataset is not None
        assert self.camera is not None
        for _, frames in self.dataset.frames(self.camera, [clip.part]):
            yield from frames


def pick_frames(frames: Iterable[np.ndarray], places: Iterable[int]) -> dict[int, np.ndarray]:
    """Those frames of a clip, decoded up to the last one wanted; places past its end are not in the result."""
    wanted = set(places)
    last = max(wanted, default=-1)
    found = {}
    for place, frame in enumerate(frames):
        if place in wanted:
            found[place] = frame
        if place >= last:
            break
    return found


def _videos_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())


def _open_all(files: list[Path], root: Path) -> tuple[list[Clip], list[float]]:
    clips, rates = [], []
    for path in files:
        try:
            with SequentialVideo(path) as video:
                clips.append(Clip(path.relative_to(root).as_posix(), video.length or video.count(), path))
                rates.append(video.fps)
        except DatasetError as error:
            if len(files) == 1:
                raise
            logger.warning("left out: %s", error)
    return clips, rates
