"""The episodes of a dataset in columns: a few bytes each, so that every process can hold a hundred thousand of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Episode", "EpisodeTable", "Paths"]


class Episode(NamedTuple):
    """Where one episode is."""

    number: int  # its index
    length: int  # frames
    data: str  # its parquet file, relative to the dataset
    videos: Mapping[str, tuple[str, float]]  # camera -> video file relative to the dataset, seconds of its first frame

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"episode {self.number}"


class EpisodeTable(Sequence[Episode]):
    """The episodes of a dataset, a few bytes each: a hundred thousand of them have to fit.

    Args:
        columns: number, length and place, each [E] int64; and per camera a pair of columns, place [E] int64 and start
            [E] float64 in seconds. A place is the number of a file.
        data: parquet files by place, relative to the dataset.
        videos: camera -> video files by place.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], data: Sequence[str], videos: Mapping[str, Sequence[str]]
    ) -> None:
        order = np.argsort(columns["number"], kind="stable")
        self.columns = {name: values[order] for name, values in columns.items()}
        self.data, self.videos = data, videos
        self.numbers = self.columns["number"]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        values = {name: column[place].item() for name, column in self.columns.items()}
        videos = {
            camera: (files[values[f"{camera}/place"]], values[f"{camera}/start"])
            for camera, files in self.videos.items()
        }
        return Episode(values["number"], values["length"], self.data[values["place"]], videos)

    def find(self, number: int) -> Episode | None:
        """The episode of that number."""
        place = int(np.searchsorted(self.numbers, number))
        found: Episode | None = self[place] if place < len(self) and self.numbers[place] == number else None
        return found

    def only(self, numbers: Set[int]) -> EpisodeTable:
        """The table without other episodes."""
        kept = np.isin(self.numbers, np.fromiter(numbers, np.int64, len(numbers)))
        return EpisodeTable({name: column[kept] for name, column in self.columns.items()}, self.data, self.videos)


class Paths(Sequence[str]):
    """Paths made from a template when they are asked for: `path(template, **fields)`."""

    def __init__(self, path: Callable[..., str], template: str, fields: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._template, self._fields = path, template, fields
        if fields:
            self[0]  # a template that leads out of the dataset is refused at once

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, place: Any) -> Any:
        return self._path(self._template, **self._fields[place])
