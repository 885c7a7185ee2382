"""The episodes of a dataset in columns: a few bytes each, so that every process can hold a hundred thousand of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DatasetError
from .parquet import path_inside, require_parquet
from .sources import shown

__all__ = ["Episode", "EpisodeTable", "read_v2", "read_v3"]


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


class _Paths(Sequence[str]):
    """Paths made from a template when they are asked for: `path(template, **fields)`."""

    def __init__(self, path: Callable[..., str], template: str, fields: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._template, self._fields = path, template, fields
        if fields:
            self[0]  # a template that leads out of the dataset is refused at once

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, place: Any) -> Any:
        return self._path(self._template, **self._fields[place])


def read_v2(root: Path, info: Mapping[str, Any], keys: Sequence[str]) -> EpisodeTable:
    """The table of a version 2 dataset; `keys`: the cameras that are videos. Errors as :func:`read_v3`."""
    path_of = _path_maker(root, info)
    path = root / "meta" / "episodes.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{shown(path)} cannot be read: {error}") from error
    numbers, lengths = [], []
    for place, line in enumerate(lines):
        if line.strip():
            try:
                entry = json.loads(line)
                numbers.append(int(entry["episode_index"]))
                lengths.append(int(entry["length"]))
            except (KeyError, TypeError, ValueError) as error:
                raise DatasetError(
                    f"{shown(path)}, line {place + 1}: an object with episode_index and length is expected "
                    f"({type(error).__name__}: {error})"
                ) from error
    size = int(info["chunks_size"])
    fields = [{"episode_index": number, "episode_chunk": number // size} for number in numbers]
    columns: dict[str, Any] = {
        "number": numbers,
        "length": lengths,
        "place": range(len(numbers)),
    }
    data, videos = _Paths(path_of, "data_path", fields), {}
    for key in keys:
        videos[key] = _Paths(path_of, "video_path", [{**each, "video_key": key} for each in fields])
        columns |= {f"{key}/place": range(len(numbers)), f"{key}/start": [0.0] * len(numbers)}
    return EpisodeTable({name: np.array(values) for name, values in columns.items()}, data, videos)


def read_v3(root: Path, info: Mapping[str, Any], keys: Sequence[str]) -> EpisodeTable:
    """The table of a version 3.0 dataset; `keys`: the cameras that are videos.

    Raises:
        DatasetError: the metadata are damaged; KeyError, TypeError, ValueError and OSError likewise.
    """
    parquet, path_of = require_parquet(), _path_maker(root, info)
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"{shown(root)}/meta/episodes holds no parquet file")
    names = {"number": "episode_index", "length": "length", "data/chunk": "data/chunk_index"}
    names["data/file"] = "data/file_index"
    for key in keys:
        names[f"{key}/start"] = f"videos/{key}/from_timestamp"
        names |= {f"{key}/{part}": f"videos/{key}/{part}_index" for part in ("chunk", "file")}
    parts = []
    for path in paths:  # the columns of statistics, which are by far the most, are not read
        table = parquet.read_table(path, columns=list(names.values()), partitioning=None)
        parts.append({name: table.column(column).to_numpy() for name, column in names.items()})
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    if any(np.isnan(values).any() for values in columns.values() if values.dtype.kind == "f"):
        raise DatasetError(f"{shown(root)}/meta/episodes has empty cells where an episode's place is expected")

    def files(prefix: str, template: str, **more: str) -> tuple[np.ndarray, _Paths]:
        pairs = np.stack([columns.pop(f"{prefix}/{part}").astype(np.int64) for part in ("chunk", "file")], axis=1)
        unique, place = np.unique(pairs, axis=0, return_inverse=True)
        fields = [{"chunk_index": chunk, "file_index": file, **more} for chunk, file in unique.tolist()]
        return place.reshape(-1), _Paths(path_of, template, fields)

    columns["place"], data = files("data", "data_path")
    videos = {}
    for key in keys:
        columns[f"{key}/place"], videos[key] = files(key, "video_path", video_key=key)
    integers = ("number", "length")
    return EpisodeTable(columns | {name: columns[name].astype(np.int64) for name in integers}, data, videos)


def _path_maker(root: Path, info: Mapping[str, Any]) -> Callable[..., str]:
    def path(template: str, **fields: Any) -> str:
        return path_inside(root, info[template].format(**fields))

    return path
