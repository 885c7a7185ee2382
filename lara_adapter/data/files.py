"""Videos and folders of pictures as episodes of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, LaraArgumentError
from .dataset import Dataset, EpisodeLike, logger
from .sources import Source, list_pictures, shown
from .video import VideoFile, decode_picture

__all__ = ["FileDataset"]


class FileDataset(Dataset):
    """Each video, and each folder of pictures, is an episode; it is named by its path below the folder.

    Args:
        root: the folder that was searched, or the one file.
        sources: what was found, of kind "video" or "pictures".

    Raises:
        DatasetError: none of them can be opened.
    """

    def __init__(self, root: Path, sources: Sequence[Source]) -> None:
        self.root, self.name = root, shown(root.resolve().name)
        self.cameras, self.left_out = ("",), {}
        base = root.parent if root.is_file() else root
        episodes, damaged, rates = [], {}, []
        for number, source in enumerate(sources):
            length = 0
            try:
                if source.kind == "pictures":
                    length, rate = len(list_pictures(source.path)), source.fps
                else:
                    with VideoFile(source.path) as video:
                        length, rate = video.length or video.count(), video.fps
                rates.append(rate)
            except DatasetError as error:
                damaged[number] = str(error)
            name = shown(source.path.relative_to(base)) if source.path != base else self.name
            episodes.append(EpisodeLike(number, length, name, source))
        self.episodes = episodes
        self.leave_out(damaged)
        self.fps = rates[0]
        if len({round(rate, 2) for rate in rates}) > 1:
            logger.warning(
                "%s: the videos have %g to %g frames per second; a gap in seconds is counted in frames of the first (%g)",
                self.name, min(rates), max(rates), self.fps,
            )  # fmt: skip

    def camera(self, name: str | None) -> str:
        """The one camera, which has no name.

        Raises:
            LaraArgumentError: a name is given.
        """
        if name:
            raise LaraArgumentError(f"camera={name!r}, but {self._choice()}")
        return ""

    def _choice(self) -> str:
        return f"{self.name} holds plain videos or pictures, of one camera without a name: leave it out"

    def frames(self, camera: str, episodes: Sequence[Any]) -> Iterator[tuple[Any, Iterator[np.ndarray]]]:
        """See :meth:`Dataset.frames`."""
        for episode in episodes:
            yield episode, self._read(episode.place)

    def _read(self, source: Source) -> Iterator[np.ndarray]:
        if source.kind == "pictures":
            for path in list_pictures(source.path):
                yield decode_picture(path.read_bytes(), shown(path))
            return
        with VideoFile(source.path) as video:
            yield from video.all_frames()

    def sources(self, camera: str) -> Iterator[Source]:
        """See :meth:`Dataset.sources`."""
        for episode in self.episodes:
            yield episode.place
