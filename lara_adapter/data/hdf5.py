"""The reader of robomimic's and LIBERO's HDF5 files, through h5py.

A file holds demonstrations: `data/demo_3/obs/agentview_image` [T, H, W, 3] uint8, `data/demo_3/actions` [T, A], and the
attribute `num_samples` of `data/demo_3`, which is T and is written last.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError
from .dataset import Content
from .hdf5_frames import DAMAGE, error_text, kind_of, read_rows, require_h5py
from .pictures import PictureDataset, files_in
from .sources import natural_key, shown

__all__ = ["Hdf5Dataset"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".hdf5", ".h5")
_FPS = 20.0  # robosuite's default


class Hdf5Dataset(PictureDataset):
    """Demonstrations of robomimic or LIBERO; a file, or a folder of files, read only.

    An episode is one demonstration: file by file, and in each in natural order (demo_2 before demo_10). Filters of
    robomimic (`mask/train`) are not applied. Cameras are what `obs` holds as RGB uint8, [T, H, W, 3] or [T, 3, H, W],
    or as JPEG or PNG files, one per frame. Frames are as the file has them: LIBERO and robosuite often store them upside
    down, as OpenGL renders them, and a policy that trained on turned frames needs them turned for LARA too.

    Args:
        path: a file, or a folder with files that end in .hdf5 or .h5.
        fps: frames per second; None: the `control_freq` that the files state, or 20.

    Attributes:
        depth: depth maps and whatever else is no RGB picture, which are not used.

    Raises:
        DatasetError: h5py is missing, there is no such file, a file has another layout, or all are damaged.
    """

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a file, or the first file of a folder, is HDF5 with the group `data`, or cannot be looked into."""
        files = files_in(path, _SUFFIXES)
        if not files or not files[0].name.lower().endswith(_SUFFIXES):
            return False
        try:
            with require_h5py().File(files[0], "r") as file:
                return "data" in file
        except (*DAMAGE, DatasetError):
            return True

    def __init__(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        self.root = Path(path)
        self.name = shown(self.root.resolve().name)
        self._files = files_in(self.root, _SUFFIXES)
        if not self._files:
            raise DatasetError(f"{shown(self.root)} holds no file that ends in {' or '.join(_SUFFIXES)}")
        self._demos: list[str] = []  # name of each episode in its file; "": the file cannot be opened
        self._places: list[int] = []  # the file of each episode
        self._kinds: dict[str, str] = {}  # what in obs was looked at -> "rgb", "encoded", "depth" or ""
        self._has_actions, self._rates, self.left_out = False, set[float](), {}
        lengths: list[int] = []
        damaged: dict[int, str] = {}
        for place, file in enumerate(self._files):
            for demo, found in self._scan(file):
                if isinstance(found, str):
                    damaged[len(lengths)] = found
                self._demos.append(demo)
                self._places.append(place)
                lengths.append(found if isinstance(found, int) else 0)
        if not lengths:
            raise DatasetError(f"{shown(self.root)}: the group 'data' holds no demonstration")
        self.cameras = tuple(sorted(key for key, kind in self._kinds.items() if kind in ("rgb", "encoded")))
        self.depth = tuple(sorted(key for key, kind in self._kinds.items() if kind == "depth"))
        if self.depth:
            logger.info("%s: not used, because they are not RGB: %s", self.name, ", ".join(self.depth))
        self._set_episodes(lengths)
        self.leave_out(damaged)
        if not self.cameras:
            raise DatasetError(
                f"{shown(self.root)}: obs holds no uint8 pictures, only {', '.join(self._kinds) or 'nothing'}; a low_dim "
                "file gets its pictures from robomimic's dataset_states_to_obs.py"
            )
        self.fps = self._choose_fps(fps)

    def _choose_fps(self, fps: float | None) -> float:
        if fps is not None:
            return float(fps)
        if len(self._rates) > 1:
            rates = ", ".join(f"{rate:g}" for rate in sorted(self._rates))
            raise DatasetError(f"{shown(self.root)} holds files of {rates} frames per second; use each folder alone")
        if not self._rates:
            logger.info("%s states no control_freq: %g frames per second are assumed", self.name, _FPS)
        return self._rates.pop() if self._rates else _FPS

    def _scan(self, path: Path) -> Iterator[tuple[str, int | str]]:
        """The demonstrations of a file, and the length of each or what is wrong with it."""
        h5py = require_h5py()
        try:
            with h5py.File(path, "r") as file:
                data = file.get("data")
                if not isinstance(data, h5py.Group):
                    raise DatasetError(
                        f"{shown(path)} holds {', '.join(file) or 'nothing'}, but data/demo_0, ... is expected, the layout "
                        "of robomimic and LIBERO; convert it, or move it elsewhere"
                    )
                self._read_metadata(path, file, data)
                for demo in sorted(data, key=natural_key):
                    try:
                        yield demo, self._length(h5py, data[demo])
                    except DAMAGE as error:
                        yield demo, f"{demo} of {shown(path)}: {error_text(error)}"
        except DatasetError:
            raise
        except DAMAGE as error:
            yield "", f"{shown(path)} cannot be read, with all that it holds ({error_text(error)})"

    def _read_metadata(self, path: Path, file: Any, data: Any) -> None:
        """The rate that a file states; of the first file also what is said once."""
        try:
            text = data.attrs.get("env_args", "{}")
            env_args = text.decode() if isinstance(text, bytes) else str(text)
            stated = json.loads(env_args).get("env_kwargs", {})
            if "control_freq" in stated:
                self._rates.add(float(stated["control_freq"]))
            if self._demos:
                return
            if "bddl_file_name" in data.attrs or "libero" in env_args.lower():
                logger.info("%s: LIBERO stores frames upside down; they are used as they are", self.name)
            if "mask" in file:
                filters = ", ".join(f"mask/{name}" for name in file["mask"])
                logger.info("%s: all demonstrations are used, not only those of %s", self.name, filters)
        except DAMAGE as error:
            logger.warning("%s: its metadata cannot be read (%s)", shown(path), error_text(error))

    def _length(self, h5py: Any, demo: Any) -> int:
        if not isinstance(demo, h5py.Group) or "obs" not in demo:
            raise ValueError("it has no obs")
        if "num_samples" not in demo.attrs:
            raise ValueError("it has no attribute num_samples, which is written last: recording was interrupted")
        self._has_actions = self._has_actions or "actions" in demo
        length = int(demo.attrs["num_samples"])
        if length < 1:
            raise ValueError("it has no frames")
        for key in set(demo["obs"]) - self._kinds.keys():
            entry = demo["obs"][key]
            if isinstance(entry, h5py.Dataset) and len(entry.shape) > 0 and entry.shape[0] > 0:
                self._kinds[key] = kind_of(key, entry)
        return length

    def _file(self, number: int) -> Path:
        return self._files[self._places[number]]

    def _inside(self, number: int) -> str:
        return self._demos[number]

    def contents(self, camera: str, episode: Any, places: Sequence[int] | None = None) -> Iterator[Content]:
        """See :meth:`Dataset.contents`."""
        h5py, path, demo = require_h5py(), self._file(episode.number), self._demos[episode.number]
        try:
            with h5py.File(path, "r") as file:
                dataset = file[f"data/{demo}/obs/{camera}"]
                if len(dataset) != episode.length:
                    raise ValueError(_differ(camera, len(dataset), episode.length))
                yield from read_rows(camera, dataset, places)
        except DAMAGE as error:
            raise DatasetError(f"{self._damaged(episode)}: {camera}, {error_text(error)}") from error

    def actions(self, episode: Any) -> np.ndarray | None:
        """See :meth:`Dataset.actions`; whole numbers become float32."""
        if not self._has_actions:
            return None
        h5py, path, demo = require_h5py(), self._file(episode.number), self._demos[episode.number]
        try:
            with h5py.File(path, "r") as file:
                actions: np.ndarray = file[f"data/{demo}/actions"][()]
            if len(actions) != episode.length:
                raise ValueError(_differ("actions", len(actions), episode.length))
            actions = actions.reshape(len(actions), -1)
            return actions if actions.dtype.kind == "f" else actions.astype(np.float32)
        except DAMAGE as error:
            raise DatasetError(f"{self._damaged(episode)}: actions: {error_text(error)}") from error

    def check(self, cameras: Sequence[str], *, rows: bool = False) -> dict[int, str]:
        """See :meth:`Dataset.check`: what each demonstration lacks, and how long it is."""
        h5py, damaged = require_h5py(), dict[int, str]()
        needed = [f"obs/{camera}" for camera in cameras] + ["actions"] * (rows and self._has_actions)
        for place, group in groupby(self.episodes, lambda episode: self._places[episode.number]):
            episodes = list(group)
            try:
                with h5py.File(self._files[place], "r") as file:
                    for number, length, name, _ in episodes:
                        demo = file[f"data/{self._demos[number]}"]
                        lengths = {key: len(demo[key]) if key in demo else None for key in needed}
                        wrong = [_differ(key, found, length) for key, found in lengths.items() if found != length]
                        if wrong:
                            damaged[number] = f"{name}: {'; '.join(wrong)}"
            except DAMAGE as error:
                reason = f"{shown(self._files[place])} cannot be read ({error_text(error)})"
                damaged = dict.fromkeys((episode.number for episode in episodes), reason) | damaged
        return dict(sorted(damaged.items()))


def _differ(key: str, found: int | None, length: int) -> str:
    have = "is missing" if found is None else f"has {found} entries"
    return f"{key} {have}, but num_samples is {length}"
