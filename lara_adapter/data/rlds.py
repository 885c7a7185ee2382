"""The reader of RLDS datasets (Open X-Embodiment) as tensorflow-datasets writes them: a TFRecord is an episode.

Through :mod:`.tfrecord`: the package `tfrecord` cannot be imported beside TensorFlow (both register the same messages),
verifies nothing and knows no offsets; `tensorflow-datasets` needs TensorFlow for TFRecords, and decodes whole episodes.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DatasetError
from .dataset import Content
from .pictures import PictureDataset
from .rlds_info import FEATURES, Stated, find_folder, is_camera, is_version, list_shards, read_steps, width
from .sources import shown
from .tfrecord import (
    Feature,
    Record,
    byte_strings,
    count,
    features,
    numbers,
    open_records,
    records,
    require_crc32c,
    verify,
)

__all__ = ["RldsDataset"]

logger = logging.getLogger(__name__)

_FPS = 10.0
_FEW = 1024  # numbers per step that are read to count steps; a picture as a tensor has more
_NONE = Feature(0, 0, 0)
_DAMAGE = (OSError, ValueError, zlib.error)


class RldsDataset(PictureDataset):
    """The episodes of all splits of an RLDS dataset, read only.

    Episodes are numbered split by split and shard by shard, as `dataset_info.json` lists them, with those of missing
    shards. Cameras are the image features of `steps` with three channels of uint8, named without "steps/observation/".
    The action is `steps/action`; where it has parts, they are concatenated in the alphabetical order of their names,
    numbers only. The checksum of an episode is verified when all of its pictures or its actions are read.

    Args:
        path: the folder with features.json, the dataset's folder above (then of its newest version), or one TFRecord file.
        fps: frames per second, which the format does not state; None: 10.

    Attributes:
        depth: image features that are not cameras, such as depth maps.

    Raises:
        DatasetError: google-crc32c is missing, there is no such dataset, it is not RLDS, or all of it is damaged.
    """

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a folder, or one in it that is named like a version, has features.json; or a file is a TFRecord."""
        return (path.is_dir() or ".tfrecord" in path.name) and find_folder(path) is not None

    def __init__(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        require_crc32c()
        self.root, folder = Path(path), find_folder(Path(path))
        if folder is None:
            raise DatasetError(f"{shown(self.root)} is not an RLDS dataset: it has no {FEATURES}")
        version = folder.name if is_version(folder.name) else ""
        self.name = shown(f"{folder.resolve().parent.name}/{version}" if version else folder.resolve().name)
        self._steps = read_steps(folder)
        images = [name for name, feature in self._steps.items() if "image" in feature]
        keys = {name: name.removeprefix("steps/").removeprefix("observation/") for name in images}
        self._features = {keys[name]: name for name in images if is_camera(self._steps[name]["image"])}
        self.cameras = tuple(self._features)
        self.depth = tuple(key for key in keys.values() if key not in self._features)
        if self.depth:
            logger.info("%s: not used, because they are not RGB: %s", self.name, ", ".join(self.depth))
        if not self.cameras:
            raise DatasetError(f"{shown(folder / FEATURES)}: steps have no image of three channels")
        actions = [name for name in sorted(self._steps) if re.match("steps/action(/|$)", name)]
        self._actions = [name for name in actions if width(self._steps[name])]
        few = [name for name, each in self._steps.items() if 0 < width(each) <= _FEW and _is_plain(each)]
        few.sort(key=lambda name: (name in self._actions, width(self._steps[name]), name))
        self._counters = [*few, *self._features.values()]  # what tells the number of steps; the first that a record has
        if fps is None:
            logger.info("%s: RLDS states no rate: %g frames per second are assumed", self.name, _FPS)
        self.fps = _FPS if fps is None else float(fps)
        self._scan(folder)

    def _scan(self, folder: Path) -> None:
        shards = list_shards(folder, self.root.name if self.root.is_file() else None)
        self._paths = [path for path, _ in shards]
        starts, sizes, places, firsts, lengths = [], [], [], [], list[int]()
        damaged: dict[int, str] = {}
        for place, (path, expected) in enumerate(shards):
            first, reason = len(lengths), ""
            firsts.append(first)
            try:
                with open_records(path) as file:
                    for record in records(file):
                        starts.append(record.start)
                        sizes.append(record.size)
                        lengths.append(0)
                        try:
                            lengths[-1] = self._length(file, record)
                        except ValueError as error:
                            where = f"{shown(path)}: record {len(lengths) - 1 - first}"
                            damaged[len(lengths) - 1] = f"{where}: {error}"
            except FileNotFoundError:
                reason = f"{shown(path)} is missing"
            except _DAMAGE as error:
                reason = f"{shown(path)}: {error}"
            found = len(lengths) - first
            lost = max((expected or 0) - found, bool(reason))
            damaged |= dict.fromkeys(range(len(lengths), len(lengths) + lost), reason or _fewer(path, found, lost))
            for values in (starts, sizes, lengths):
                values.extend([0] * lost)
            places.extend([place] * (found + lost))
        if not lengths:
            raise DatasetError(f"{shown(folder)} holds no episode: its TFRecord files are missing or empty")
        self._starts, self._sizes = np.array(starts, np.int64), np.array(sizes, np.int64)
        self._places, self._firsts = np.array(places, np.int32), firsts
        self._verified, self.left_out = np.zeros(len(lengths), bool), {}
        self._set_episodes(lengths)
        self.leave_out(damaged)

    def _length(self, file: BinaryIO, record: Record) -> int:
        """The number of steps, from numbers of a step: pictures are looked at only if there is nothing else."""
        known = dict(features(file, record))
        name = next((name for name in self._counters if name in known), None)
        if name is None:
            raise ValueError("it has none of the features of steps")
        length, rest = divmod(count(file, known[name]), width(self._steps[name]) or 1)
        if rest:
            raise ValueError(f"{name} breaks off within a step")
        if not length:
            raise ValueError("it has no steps")
        return length

    def _file(self, number: int) -> Path:
        return self._paths[self._places[number]]

    def _inside(self, number: int) -> str:
        return f"record {number - self._firsts[self._places[number]]}"

    def _record(self, number: int) -> Record:
        return Record(int(self._starts[number]), int(self._sizes[number]))

    def _verify(self, file: BinaryIO, number: int) -> None:
        if not self._verified[number]:
            verify(file, self._record(number))
            self._verified[number] = True

    def contents(self, camera: str, episode: Any, places: Sequence[int] | None = None) -> Iterator[Content]:
        """See :meth:`Dataset.contents`."""
        number, name, done = episode.number, self._features[camera], 0
        try:
            with open_records(self._file(number)) as file:
                feature = dict(features(file, self._record(number))).get(name, _NONE)
                if places is None:
                    self._verify(file, number)
                    _compare(name, count(file, feature), episode.length)
                for content in byte_strings(file, feature, places):
                    yield content
                    done += 1
        except _DAMAGE as error:
            frame = done if places is None else places[done]
            raise DatasetError(f"{self._damaged(episode)}: frame {frame}: {error}") from error

    def actions(self, episode: Any) -> np.ndarray | None:
        """See :meth:`Dataset.actions`: float32."""
        if not self._actions:
            return None
        columns = []
        try:
            with open_records(self._file(episode.number)) as file:
                self._verify(file, episode.number)
                known = dict(features(file, self._record(episode.number)))
                for name in self._actions:
                    values = _values(file, known.get(name, _NONE), self._steps[name])
                    _compare(name, len(values) / width(self._steps[name]), episode.length)
                    columns.append(values.reshape(episode.length, -1).astype(np.float32))
        except _DAMAGE as error:
            raise DatasetError(f"{self._damaged(episode)}: {error}") from error
        return np.concatenate(columns, axis=1)

    def check(self, cameras: Sequence[str], *, rows: bool = False) -> dict[int, str]:
        """See :meth:`Dataset.check`: counts the pictures and the actions of each episode, and reads none of them."""
        damaged: dict[int, str] = {}
        widths = {self._features[camera]: 1 for camera in cameras}
        for name in self._actions if rows else []:
            widths[name] = width(self._steps[name]) if _is_plain(self._steps[name]) else 1
        for episode in self.episodes:
            try:
                with open_records(self._file(episode.number)) as file:
                    known = dict(features(file, self._record(episode.number)))
                    for name, values in widths.items():
                        _compare(name, count(file, known.get(name, _NONE)) / values, episode.length)
            except _DAMAGE as error:
                damaged[episode.number] = f"{episode.name}: {error}"
        return damaged


def _is_plain(feature: Stated) -> bool:
    """Whether numbers are stored as numbers, and not as bytes."""
    return feature["tensor"].get("encoding", "none") == "none"


def _values(file: BinaryIO, feature: Feature, stated: Stated) -> np.ndarray:
    """All numbers of a tensor feature, flat."""
    if _is_plain(stated):
        return numbers(file, feature)
    packed = stated["tensor"]["encoding"] == "zlib"
    contents = [zlib.decompress(part) if packed else part for part in byte_strings(file, feature)]
    return np.frombuffer(b"".join(contents), np.dtype(stated["tensor"]["dtype"]))


def _compare(name: str, found: float, length: int) -> None:
    if found != length:
        raise ValueError(
            f"{name} has {found:g} entries, but there are {length} steps" if found else f"{name} is missing"
        )


def _fewer(path: Path, found: int, lost: int) -> str:
    return f"{shown(path)} holds {found} of {found + lost} episodes"
