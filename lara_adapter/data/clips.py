"""Videos and datasets as clips, for whatever reads some frames of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DatasetError
from .episodes import INFO, Episode, EpisodeDataset
from .sources import VIDEOS, find_sources
from .video import VideoFile

__all__ = ["Clip", "ClipSource"]

logger = logging.getLogger(__name__)


class Clip(NamedTuple):
    """One episode of a dataset, or one video file."""

    name: str  # "episode 3", or the file's name, with the folders below the one that was given
    length: int  # frames; for a video what its header says, or an estimate
    part: Episode | Path  # the episode, or the file


class ClipSource:
    """A dataset of the LeRobot format, a folder of videos (searched below too), or one video.

    A dataset and a single video are read whole or refused; of a folder a damaged video is left out with a warning.

    Args:
        source: folder, file, or Hub id of a dataset.
        camera: of a dataset; None: the only one.
        revision: of a dataset on the Hub.

    Attributes:
        name: of the folder or file, or the Hub id.
        dataset: the dataset, None for videos.
        camera: its camera, None for videos.
        fps: frames per second; of the first video.
        clips: the episodes, or the videos that can be opened.

    Raises:
        DatasetError: nothing can be read.
        LaraArgumentError: no such camera.
    """

    def __init__(self, source: str | os.PathLike[str], camera: str | None = None, revision: str | None = None) -> None:
        path = Path(source)
        self.dataset: EpisodeDataset | None = None
        self.camera: str | None = None
        self.clips: list[Clip] = []
        self._folder = path.is_dir() and not (path / INFO).is_file()
        if not self._folder and not path.is_file():
            self.dataset = EpisodeDataset(source, revision)
            self.camera = self.dataset.camera(camera)
            self.name, self.fps = self.dataset.name, self.dataset.fps
            self.clips = [
                Clip(f"episode {episode.number}", episode.length, episode) for episode in self.dataset.episodes
            ]
            return
        self.name, rates = path.resolve().name, []
        for file in [found.path for found in find_sources([path]) if found.kind == "video"]:
            try:
                with VideoFile(file) as video:
                    name = file.relative_to(path if self._folder else path.parent).as_posix()
                    self.clips.append(Clip(name, video.length or video.count(), file))
                    rates.append(video.fps)
            except DatasetError as error:
                self._leave_out(error)
        if not self.clips:
            raise DatasetError(
                f"{path} holds neither {INFO} (a LeRobot dataset) nor a video that can be read: {', '.join(sorted(VIDEOS))}"
            )
        self.fps = rates[0]

    def pick(self, clip: Clip, places: Iterable[int]) -> dict[int, np.ndarray] | None:
        """Some frames of a clip, decoded up to the last one.

        Args:
            clip: one of `clips`.
            places: numbers of the frames.

        Returns:
            Number -> frame [H, W, 3] uint8, without those past its end; None: the video is damaged and left out.

        Raises:
            DatasetError: an episode, or the one video, is damaged.
        """
        rest = set(places)
        frames: dict[int, np.ndarray] = {}
        try:
            for place, frame in enumerate(self._frames(clip) if rest else ()):
                if place in rest:
                    frames[place] = frame
                    rest.remove(place)
                    if not rest:
                        break
        except DatasetError as error:
            self._leave_out(error)
            return None
        return frames

    def _frames(self, clip: Clip) -> Iterator[np.ndarray]:
        if isinstance(clip.part, Path):
            with VideoFile(clip.part) as video:
                yield from video.all_frames()
            return
        assert self.dataset is not None
        assert self.camera is not None
        for _, frames in self.dataset.frames(self.camera, [clip.part]):
            yield from frames

    def _leave_out(self, error: DatasetError) -> None:
        if not self._folder:
            raise error
        logger.warning("left out: %s", error)
