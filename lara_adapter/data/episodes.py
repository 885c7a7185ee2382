"""The reader of the LeRobot dataset format, versions 2.0, 2.1 and 3.0: episodes, their columns and their frames.

A version 3.0 folder keeps many episodes in one parquet and one video file, and `meta/episodes/*/*.parquet` says where each
begins; version 2 has one of each per episode, and `meta/episodes.jsonl`. Plain pyarrow, JSON and PyAV.

A dataset is read whole or refused: an episode is damaged if a file, a row or a frame of it is missing or cannot be
decoded, and a :class:`DatasetError` names it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import AdapterFormatError, DatasetError, LaraArgumentError
from ..storage.files import read_json
from ..storage.hub import locate_folder
from .video import VideoFile, decode_picture, require_av

__all__ = ["INFO", "VERSIONS", "Episode", "EpisodeDataset", "cell_bytes", "require_parquet"]

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_IMAGES = "observation.images."
_ROWS = 64  # pictures held at once while a parquet file is read


def require_parquet() -> Any:
    """pyarrow.parquet, or a DatasetError that names the package to install."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError("LeRobot datasets need pyarrow: pip install 'lara-adapter[video]'") from error
    return pyarrow.parquet


class Episode(NamedTuple):
    """Where one episode is."""

    number: int  # its index
    length: int  # frames
    data: str  # its parquet file, relative to the dataset
    videos: Mapping[str, tuple[str, float]]  # camera -> video file relative to the dataset, seconds of its first frame


class EpisodeDataset:
    """A dataset folder of the LeRobot format, read only.

    Args:
        source: local folder, or Hub id of a dataset.
        revision: commit, tag or branch on the Hub.

    Attributes:
        root: the folder.
        name: Hub id, or the folder's name.
        version: one of VERSIONS.
        fps: frames per second.
        features: column or camera -> its dtype, shape and names, as in `meta/info.json`.
        cameras: the cameras, in that order, without depth maps.
        episodes: in order.

    Raises:
        DatasetError: no such dataset, an unknown version, or damaged metadata.
    """

    def __init__(self, source: str | os.PathLike[str], revision: str | None = None) -> None:
        try:
            self.root = locate_folder(source, revision, [INFO, "*"], "LeRobot dataset", "dataset")
        except AdapterFormatError as error:
            raise DatasetError(f"dataset: {error}") from error
        self.name = self.root.resolve().name if Path(source).is_dir() else str(source)
        try:
            info = read_json(self.root / INFO)
        except AdapterFormatError as error:
            raise DatasetError(f"{self.root} is not a LeRobot dataset: {error}") from error
        self.info = info
        self.version = str(info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise DatasetError(
                f"{self.root} has codebase_version {self.version!r}, but {', '.join(VERSIONS)} can be read; convert it "
                "with the scripts of LeRobot"
            )
        try:
            self.fps = float(info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(info["features"])
            self.cameras = tuple(key for key, feature in self.features.items() if _is_camera(feature))
            read = self._episodes_v3 if self.version == "v3.0" else self._episodes_v2
            self.episodes = sorted(read(), key=lambda episode: episode.number)
        # OSError: what pyarrow raises for a damaged file
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{self.root}/meta is damaged: {type(error).__name__}: {error}") from error
        if not self.episodes:
            raise DatasetError(f"{self.root} holds no episodes")
        self._by_number = {episode.number: episode for episode in self.episodes}

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return sum(episode.length for episode in self.episodes)

    def episode(self, number: int) -> Episode | None:
        """The episode of that index, if there is one."""
        return self._by_number.get(number)

    def camera(self, name: str | None) -> str:
        """The camera of that name, or the only one.

        Args:
            name: key, with or without "observation.images."; None: the only camera.

        Raises:
            LaraArgumentError: there is none of that name, or None was given and there are several.
        """
        keys = self.cameras if name is None else self._named([name])
        if len(keys) != 1:
            raise LaraArgumentError(f"camera={name!r}, but {self._choice()}")
        return keys[0]

    def select_cameras(self, names: Collection[str]) -> tuple[str, ...]:
        """The cameras of those names, as for :meth:`camera`; without names all of them.

        Raises:
            LaraArgumentError: there is none of these names.
        """
        keys = self._named(names) if names else self.cameras
        if names and not keys:
            raise LaraArgumentError(f"cameras={list(names)}, but {self._choice()}")
        return keys

    def _named(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(key for key in self.cameras if key in names or key.removeprefix(_IMAGES) in names)

    def _choice(self) -> str:
        return f"{self.name} has {', '.join(self.cameras) or 'no camera'}; name one of them"

    def rows(self, episode: Episode, columns: list[str]) -> dict[str, np.ndarray]:
        """Columns of one episode: name -> [length, ...] in the order of the frames.

        Raises:
            DatasetError: the file or a column is missing, or it does not hold this episode's frames in order.
        """
        parquet = require_parquet()
        path = self.root / episode.data
        names = list(dict.fromkeys([*columns, "episode_index", "frame_index"]))
        try:
            table = parquet.read_table(path, columns=names, filters=[("episode_index", "==", episode.number)])
            arrays = {name: _as_array(table.column(name)) for name in names}
        # pyarrow's errors derive from these
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{path}: {' '.join(str(error).split())}") from error
        if not np.array_equal(arrays["frame_index"], np.arange(episode.length)):
            raise DatasetError(
                f"{path} does not hold frames 0 to {episode.length - 1} of episode {episode.number} in order, which the "
                f"dataset's metadata say; it has {len(arrays['frame_index'])}"
            )
        return {name: arrays[name] for name in columns}

    def frames(self, camera: str, episodes: list[Episode]) -> Iterator[tuple[Episode, Iterator[np.ndarray]]]:
        """The frames of episodes, each decoded once where the episodes follow each other in their files.

        Args:
            camera: one of `cameras`.
            episodes: which, in ascending order.

        Yields:
            The episode, and an iterator over its frames [H, W, 3] uint8, to be used up before the next is asked for; it
            raises DatasetError where the episode is damaged.
        """
        require_av()
        with contextlib.ExitStack() as stack:
            video: VideoFile | None = None
            for episode in episodes:
                if self.features[camera]["dtype"] == "image":
                    require_parquet()
                    frames = self._pictures(episode, camera)
                else:
                    path, start = episode.videos[camera]
                    if video is None or video.path != self.root / path:
                        stack.close()
                        with self._naming(episode):
                            video = stack.enter_context(VideoFile(self.root / path))
                    frames = video.read(start, episode.length, self.fps)
                yield episode, self._checked(episode, frames)

    def _checked(self, episode: Episode, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        with self._naming(episode):
            yield from frames

    @contextlib.contextmanager
    def _naming(self, episode: Episode) -> Iterator[None]:
        try:
            yield
        except DatasetError as error:
            raise DatasetError(f"{self.name}: episode {episode.number} is damaged: {error}") from error

    def _pictures(self, episode: Episode, camera: str) -> Iterator[np.ndarray]:
        parquet = require_parquet()
        path, done = self.root / episode.data, 0
        try:
            with parquet.ParquetFile(path) as file:
                groups = _row_groups(file.metadata, episode.number)
                for batch in file.iter_batches(_ROWS, groups, columns=["episode_index", "frame_index", camera]):
                    rows = batch.to_pydict()
                    for number, frame, cell in zip(rows["episode_index"], rows["frame_index"], rows[camera]):
                        if number != episode.number:
                            continue
                        if frame != done:
                            raise DatasetError(f"{path}: frame {done} of episode {episode.number} is missing")
                        content = cell_bytes(cell, self.root)
                        yield decode_picture(content, f"{path}, episode {episode.number}, frame {frame}")
                        done += 1
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if done != episode.length:
            raise DatasetError(f"{path} holds {done} of the {episode.length} frames of episode {episode.number}")

    def _path(self, template: str, **fields: Any) -> str:
        return _inside(self.root, self.info[template].format(**fields))

    def _video_keys(self) -> list[str]:
        return [key for key in self.cameras if self.features[key]["dtype"] == "video"]

    def _episodes_v2(self) -> Iterator[Episode]:
        path = self.root / "meta" / "episodes.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error}") from error
        for entry in (json.loads(line) for line in lines if line.strip()):
            number = int(entry["episode_index"])
            fields = {"episode_index": number, "episode_chunk": number // int(self.info["chunks_size"])}
            videos = {key: (self._path("video_path", video_key=key, **fields), 0.0) for key in self._video_keys()}
            yield Episode(number, int(entry["length"]), self._path("data_path", **fields), videos)

    def _episodes_v3(self) -> Iterator[Episode]:
        parquet = require_parquet()
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise DatasetError(f"{self.root}/meta/episodes holds no parquet file")
        for path in paths:
            # the columns of statistics are by far the most
            names = [name for name in parquet.read_schema(path).names if not name.startswith("stats/")]
            for row in parquet.read_table(path, columns=names).to_pylist():
                videos = {}
                for key in self._video_keys():
                    place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                    start = float(row[f"videos/{key}/from_timestamp"])
                    videos[key] = self._path("video_path", video_key=key, **place), start
                place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
                data = self._path("data_path", **place)
                yield Episode(int(row["episode_index"]), int(row["length"]), data, videos)


def cell_bytes(cell: Any, root: Path) -> bytes:
    """Content of the picture in a cell {"bytes", "path"} of a parquet column; the path is relative to `root`.

    Raises:
        DatasetError: the cell is empty, or its path leads out of the dataset.
        OSError: the file cannot be read.
    """
    cell = cell or {}
    if not cell.get("bytes") and not cell.get("path"):
        raise DatasetError("an empty cell where a picture is expected")
    content: bytes = cell.get("bytes") or (root / _inside(root, cell["path"])).read_bytes()
    return content


def _inside(root: Path, path: str) -> str:
    """A path from the dataset's own metadata, which must not lead out of it."""
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DatasetError(f"{root}/{INFO} or its episodes name the file {path!r} outside of the dataset")
    return path


def _is_camera(feature: Mapping[str, Any]) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    depth = info.get("is_depth_map") or info.get("video.is_depth_map")
    return feature.get("dtype") in ("video", "image") and not depth


def _row_groups(metadata: Any, episode: int) -> list[int]:
    """The row groups of a parquet file that may hold an episode, by their statistics."""
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        known = next((c.statistics for c in columns if c.path_in_schema == "episode_index"), None)
        if known is None or not known.has_min_max or known.min <= episode <= known.max:
            groups.append(number)
    return groups


def _as_array(column: Any) -> np.ndarray:
    """[rows] of a scalar column, [rows, ...] of one of lists of equal length."""
    kind = str(column.type)
    if "list" not in kind and "extension" not in kind:
        flat: np.ndarray = column.to_numpy()
        return flat
    return np.asarray(column.to_pylist())
