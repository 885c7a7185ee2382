"""Many sources in little memory: about a hundred bytes each, where the objects take a kilobyte."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from .dataset import Dataset
from .sources import Segment, Source

__all__ = ["PackedSources"]

_SEGMENT = np.dtype([("group", "i4"), ("episode", "i8"), ("start", "f8"), ("stop", "f8"), ("length", "i8")])


class _Texts:
    """Many short texts behind each other."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._content = b"".join(encoded)

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self._content[self._ends[number] : self._ends[number + 1]])


class PackedSources(Sequence[Source]):
    """A list of sources that makes each of them when it is asked for.

    Args:
        sources: what to hold; what neighbours share (folder, dataset, camera) is held once.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        shared: list[Source] = []
        which: list[int] = []
        folders: dict[str, int] = {}
        groups: dict[str, int] = {}
        names, inside, segments, ends, places = [], [], [], [0], []
        for source in sources:
            common = source._replace(path=Path(), segments=(), inside="")
            if not shared or shared[-1] != common:
                shared.append(common)
            which.append(len(shared) - 1)
            # texts of our own: each that is shared with `sources` would keep a megabyte of them from being freed
            folder = os.fsdecode(os.fsencode(source.path.parent))
            places.append(folders.setdefault(folder, len(folders)))
            names.append(source.path.name)
            inside.append(source.inside)
            for group, *rest in source.segments:
                prefix = group.removesuffix(str(rest[0]))
                numbered = prefix != group
                # an odd number: the episode's follows
                key = 2 * groups.setdefault(prefix, len(groups)) + numbered
                segments.append((key, *rest))
            ends.append(len(segments))
        self._shared, self._which = shared, np.array(which, np.int32)
        self._folders, self._places = list(folders), np.array(places, np.int32)
        self._names, self._inside = _Texts(names), _Texts(inside) if any(inside) else None
        self._groups, self._ends = list(groups), np.array(ends)
        self._segments = np.array(segments, _SEGMENT)

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, number: int) -> Source: ...

    @overload
    def __getitem__(self, number: slice) -> list[Source]: ...

    def __getitem__(self, number: int | slice) -> Source | list[Source]:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        number = range(len(self))[number]
        segments = []
        for key, episode, *times in self._segments[self._ends[number] : self._ends[number + 1]].tolist():
            group = self._groups[key // 2] + (str(episode) if key % 2 else "")
            segments.append(Segment(group, episode, *times))
        return self._shared[self._which[number]]._replace(
            path=Path(self._folders[self._places[number]], self._names[number]),
            segments=tuple(segments),
            inside=self._inside[number] if self._inside else "",
        )

    def datasets(self) -> list[Dataset]:
        """The datasets that the sources belong to, each once."""
        found = {id(source.dataset): source.dataset for source in self._shared if source.dataset is not None}
        return list(found.values())

    def lengths(self) -> np.ndarray:
        """Frames of each source as its dataset states them, [n] int64; 0 for what belongs to none."""
        total = np.concatenate([[0], np.cumsum(self._segments["length"])])
        lengths: np.ndarray = total[self._ends[1:]] - total[self._ends[:-1]]
        return lengths
