"""What the readers of archives share: episodes of pictures inside of larger files."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from .dataset import Dataset, EpisodeLike
from .sources import Source, natural_key, shown
from .video import decode_picture

__all__ = ["EpisodeColumns", "PictureDataset", "files_in"]


class EpisodeColumns(Sequence[EpisodeLike]):
    """Episodes as two numbers each; their names are made when they are asked for.

    Args:
        numbers: [E] int64, rising.
        lengths: [E] int64, frames.
        name: number -> what messages call it.
    """

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray, name: Callable[[int], str]) -> None:
        self.numbers, self.lengths, self._name = numbers, lengths, name

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return EpisodeColumns(self.numbers[place], self.lengths[place], self._name)
        number = int(self.numbers[place])
        return EpisodeLike(number, int(self.lengths[place]), self._name(number))

    def find(self, number: int) -> EpisodeLike | None:
        """The episode of that number."""
        place = int(np.searchsorted(self.numbers, number))
        found: EpisodeLike | None = self[place] if place < len(self) and self.numbers[place] == number else None
        return found

    def only(self, numbers: Set[int]) -> EpisodeColumns:
        """Those without other episodes."""
        kept = np.isin(self.numbers, np.fromiter(numbers, np.int64, len(numbers)))
        return EpisodeColumns(self.numbers[kept], self.lengths[kept], self._name)


class PictureDataset(Dataset):
    """A dataset that hands out pictures: a subclass gives `contents`, `_file` and `_inside`.

    No file stays open, so that any number of threads and processes can read at once, and the object can be pickled.
    """

    episodes: EpisodeColumns

    @abc.abstractmethod
    def _file(self, number: int) -> Path:
        """The file that an episode is in."""

    @abc.abstractmethod
    def _inside(self, number: int) -> str:
        """What its file calls an episode."""

    def _name(self, number: int) -> str:
        return shown(f"{self._inside(number)} of {self._file(number).name}")

    def _damaged(self, episode: Any) -> str:
        return (
            f"{shown(self._file(episode.number))}: episode {episode.number} ({self._inside(episode.number)}) is damaged"
        )

    def _set_episodes(self, lengths: Sequence[int]) -> None:
        counts = np.array(lengths, np.int64)
        self.episodes = EpisodeColumns(np.arange(len(counts)), counts, self._name)

    def frames(self, camera: str, episodes: Sequence[Any]) -> Iterator[tuple[Any, Iterator[np.ndarray]]]:
        """See :meth:`Dataset.frames`."""
        for episode in episodes:
            yield episode, self._decoded(camera, episode, None)

    def pick(self, camera: str, episode: Any, places: Iterable[int]) -> dict[int, np.ndarray]:
        """See :meth:`Dataset.pick`; only these pictures are read."""
        inside = sorted({place for place in places if 0 <= place < episode.length})
        return dict(zip(inside, self._decoded(camera, episode, inside)))

    def sources(self, camera: str) -> Iterator[Source]:
        """See :meth:`Dataset.sources`: one for each episode."""
        for episode in self.episodes:
            path, segments = self._file(episode.number), (self.segment(episode, 0.0),)
            yield Source(path, "episode", segments, self.fps, camera, self.root, episode.name, self)

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return int(self.episodes.lengths.sum())

    def episode(self, number: int) -> EpisodeLike | None:
        """The episode of that number; None if there is none."""
        return self.episodes.find(number)

    def _keep(self, numbers: Set[int]) -> None:
        self.episodes = self.episodes.only(numbers)

    def _decoded(self, camera: str, episode: Any, places: Sequence[int] | None) -> Iterator[np.ndarray]:
        numbers = range(episode.length) if places is None else places
        for place, content in zip(numbers, self.contents(camera, episode, places), strict=True):
            yield decode_picture(content, f"{self._damaged(episode)}: frame {place} of {camera}")


def files_in(path: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of a folder that end so, in natural order; or the one file. Hidden files do not count.

    Raises:
        DatasetError: the path cannot be read.
    """
    if path.is_file():
        return [path]
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    except OSError as error:
        raise DatasetError(f"{shown(path)} cannot be read ({error})") from error
    names = [name for name in names if name.lower().endswith(tuple(suffixes))]
    return [path / name for name in sorted(names, key=natural_key)]
