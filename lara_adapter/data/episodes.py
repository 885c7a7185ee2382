"""The reader of the LeRobot dataset format, versions 2.0, 2.1 and 3.0: episodes, their columns and their frames.

A version 3.0 folder keeps many episodes in one parquet and one video file, and `meta/episodes/*/*.parquet` says where each
begins; version 2 has one of each per episode, and `meta/episodes.jsonl`. Plain pyarrow, JSON and PyAV.

Which rows belong to an episode is what the column `episode_index` says, never a sum of lengths: episodes may have been
deleted from the metadata, and numbers left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterFormatError, DatasetError
from ..storage.files import read_json
from ..storage.hub import locate_folder
from .dataset import Content, Dataset
from .episode_table import Episode, EpisodeTable, Paths
from .sources import Source, shown
from .video import VideoFile, decode_picture, require_av

__all__ = ["INFO", "VERSIONS", "Episode", "EpisodeDataset", "cell_bytes", "require_parquet"]

logger = logging.getLogger(__name__)

INFO = "meta/info.json"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_ROWS = 64  # pictures held at once while a parquet file is read
_OPENED = 8  # files whose headers are read at once


def require_parquet() -> Any:
    """pyarrow.parquet, or a DatasetError that names the package to install."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError("LeRobot datasets need pyarrow: pip install 'lara-adapter[video]'") from error
    return pyarrow.parquet


class EpisodeDataset(Dataset):
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
        depth: the depth maps.
        episodes: in order.
        unlisted: numbers of episodes that the parquet files hold and the metadata do not list; known after
            :meth:`check` of the rows.

    Raises:
        DatasetError: no such dataset, an unknown version, or damaged metadata.
    """

    episodes: EpisodeTable

    def __init__(self, source: str | os.PathLike[str], revision: str | None = None) -> None:
        try:
            self.root = locate_folder(source, revision, [INFO, "*"], "LeRobot dataset", "dataset")
        except AdapterFormatError as error:
            raise DatasetError(f"dataset: {error}") from error
        self.name = shown(self.root.resolve().name) if Path(source).is_dir() else str(source)
        where = shown(self.root)
        try:
            info = read_json(self.root / INFO)
        except AdapterFormatError as error:
            raise DatasetError(f"{where} is not a LeRobot dataset: {error}") from error
        self.info = info
        self.version = str(info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise DatasetError(
                f"{where} has codebase_version {self.version!r}, but {', '.join(VERSIONS)} can be read; convert it "
                "with the scripts of LeRobot"
            )
        self.left_out, self.unlisted = {}, set()
        try:
            self.fps = float(info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(info["features"])
            pictures = [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]
            self.depth = tuple(key for key in pictures if _is_depth(key, self.features[key]))
            self.cameras = tuple(key for key in pictures if key not in self.depth)
            self.episodes = self._table_v3() if self.version == "v3.0" else self._table_v2()
        # OSError: what pyarrow raises for a damaged file
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{where}/meta is damaged: {type(error).__name__}: {error}") from error
        if not len(self.episodes):
            raise DatasetError(f"{where} holds no episodes")
        if self.depth:
            logger.info("%s: left out, because they are depth maps: %s", self.name, ", ".join(self.depth))
        self.leave_out(self._impossible())

    def _impossible(self) -> dict[int, str]:
        columns = self.episodes.columns
        damaged = {int(number): "it has no frames" for number in columns["number"][columns["length"] < 1]}
        numbers, times = np.unique(columns["number"], return_counts=True)
        return damaged | {int(number): "the metadata list it more than once" for number in numbers[times > 1]}

    def _keep(self, numbers: Set[int]) -> None:
        self.episodes = self.episodes.only(numbers)

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return int(self.episodes.columns["length"].sum())

    def episode(self, number: int) -> Episode | None:
        """The episode of that index, if there is one."""
        return self.episodes.find(number)

    def _choice(self) -> str:
        depth = f" (and the depth maps {', '.join(self.depth)}, which are not used)" if self.depth else ""
        return f"{self.name} has {', '.join(self.cameras) or 'no camera'}{depth}; name one of them"

    # ------------------------------------------------------------------ what is damaged

    def check(self, cameras: Sequence[str], *, rows: bool = False) -> dict[int, str]:
        """What is wrong with the episodes, found without decoding: number -> reason; the first one for each.

        The header of every video file is read, and with `rows` (or pictures in the parquet files) which frames these hold.

        Args:
            cameras: whose files are looked at.
            rows: whether the columns of frames are needed too.
        """
        damaged: dict[int, str] = {}
        if rows or any(self.features[camera]["dtype"] == "image" for camera in cameras):
            damaged |= self._check_rows()
        for camera in cameras:
            if self.features[camera]["dtype"] == "video":
                damaged = self._check_videos(camera) | damaged
        return dict(sorted(damaged.items()))

    def _check_videos(self, camera: str) -> dict[int, str]:
        table = self.episodes.columns
        places, starts = table[f"{camera}/place"], table[f"{camera}/start"]
        files = self.episodes.videos[camera]

        def seconds(place: int) -> float | str:
            """How long a file is, inf where it does not say; or what is wrong with it."""
            try:
                with VideoFile(self.root / files[place]) as video:
                    return video.stated_seconds or float("inf")
            except DatasetError as error:
                return str(error)

        damaged: dict[int, str] = {}
        used = np.unique(places).tolist()
        with ThreadPoolExecutor(_OPENED) as pool:
            for place, found in zip(used, pool.map(seconds, used)):
                inside = places == place
                ends = starts + table["length"] / self.fps
                short = inside if isinstance(found, str) else inside & (ends > found + 1.5 / self.fps)
                for number, end in zip(table["number"][short].tolist(), ends[short].tolist()):
                    damaged[number] = (
                        found
                        if isinstance(found, str)
                        else f"{shown(self.root / files[place])} ends after {found:.3f} s, but it needs frames up to {end:.3f} s"
                    )
        return damaged

    def _check_rows(self) -> dict[int, str]:
        parquet = require_parquet()
        table, damaged = self.episodes.columns, {}
        listed = dict(zip(table["number"].tolist(), zip(table["length"].tolist(), table["place"].tolist())))
        for place in np.unique(table["place"]).tolist():
            path = self.root / self.episodes.data[place]
            mine = [number for number, (_, where) in listed.items() if where == place]
            try:
                read = parquet.read_table(path, columns=["episode_index", "frame_index"])
                numbers, frames = (read.column(name).to_numpy() for name in ("episode_index", "frame_index"))
            # pyarrow's errors derive from these
            except (OSError, ValueError, KeyError) as error:
                damaged |= dict.fromkeys(mine, f"{shown(path)}: {' '.join(str(error).split())}")
                continue
            order = np.argsort(numbers, kind="stable")
            names, begins = np.unique(numbers[order], return_index=True)
            parts = dict(zip(names.tolist(), np.split(frames[order], begins[1:])))
            self.unlisted |= {name for name in parts if name not in listed and name not in self.left_out}
            for number in mine:
                found, length = parts.get(number, frames[:0]), listed[number][0]
                if not np.array_equal(found, np.arange(length)):
                    damaged[number] = _rows_missing(path, length, len(found))
        return damaged

    # ------------------------------------------------------------------ columns

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
            raise DatasetError(f"{shown(path)}: {' '.join(str(error).split())}") from error
        if not np.array_equal(arrays["frame_index"], np.arange(episode.length)):
            raise DatasetError(
                f"episode {episode.number}: {_rows_missing(path, episode.length, len(arrays['frame_index']))}"
            )
        return {name: arrays[name] for name in columns}

    def actions(self, episode: Episode) -> np.ndarray | None:
        """The column `action` of an episode, [length, A] float64; None: the dataset has none, or not of numbers.

        Raises:
            DatasetError: it is damaged.
        """
        if "action" not in self.features:
            return None
        values = self.rows(episode, ["action"])["action"]
        try:
            return values.reshape(len(values), -1).astype(np.float64)
        except (TypeError, ValueError):
            return None

    # ------------------------------------------------------------------ frames

    def frames(self, camera: str, episodes: Iterable[Episode]) -> Iterator[tuple[Episode, Iterator[np.ndarray]]]:
        """The frames of episodes, each decoded once where the episodes follow each other in their files.

        Args:
            camera: one of `cameras`.
            episodes: which, in ascending order.

        Yields:
            The episode, and an iterator over its frames [H, W, 3] uint8, to be used up before the next is asked for; it
            raises DatasetError where the episode is damaged, and the next can be read all the same.
        """
        require_av()
        with contextlib.ExitStack() as stack:
            opened: tuple[str, VideoFile] | None = None

            def video(path: str) -> VideoFile:
                nonlocal opened
                if opened is None or opened[0] != path:
                    stack.close()
                    opened = None
                    opened = path, stack.enter_context(VideoFile(self.root / path))
                return opened[1]

            def read(episode: Episode) -> Iterator[np.ndarray]:
                nonlocal opened
                with self._naming(episode):
                    try:
                        if self.features[camera]["dtype"] == "image":
                            for place, content in enumerate(self.contents(camera, episode)):
                                yield decode_picture(content, f"{shown(self.root / episode.data)}, frame {place}")
                        else:
                            path, start = episode.videos[camera]
                            yield from video(path).read(start, episode.length, self.fps)
                    except DatasetError:
                        opened = None  # where its decoder is now is not known
                        raise

            for episode in episodes:
                yield episode, read(episode)

    @contextlib.contextmanager
    def _naming(self, episode: Episode) -> Iterator[None]:
        try:
            yield
        except DatasetError as error:
            raise DatasetError(f"{self.name}: episode {episode.number} is damaged: {error}") from error

    def contents(self, camera: str, episode: Episode, places: Sequence[int] | None = None) -> Iterator[Content]:
        """See :meth:`Dataset.contents`; of a camera of dtype "image"."""
        parquet = require_parquet()
        path, done = self.root / episode.data, 0
        wanted = None if places is None else set(places)
        try:
            with parquet.ParquetFile(path) as file:
                groups = _row_groups(file.metadata, episode.number)
                for batch in file.iter_batches(_ROWS, groups, columns=["episode_index", "frame_index", camera]):
                    numbers, frames = (batch.column(name).to_numpy() for name in ("episode_index", "frame_index"))
                    for row in np.flatnonzero(numbers == episode.number).tolist():
                        if frames[row] != done:
                            raise DatasetError(f"{shown(path)}: frame {done} of episode {episode.number} is missing")
                        done += 1
                        if wanted is None or int(frames[row]) in wanted:
                            yield cell_bytes(batch.column(camera)[row].as_py(), self.root)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{shown(path)}: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if done != episode.length:
            raise DatasetError(
                f"{shown(path)} holds {done} of the {episode.length} frames of episode {episode.number}"
            )

    def sources(self, camera: str) -> Iterator[Source]:
        """See :meth:`Dataset.sources`: a video file with its episodes, or an episode of pictures."""
        if self.features[camera]["dtype"] == "image":
            for episode in self.episodes:
                segment = self.segment(episode, 0.0)
                yield Source(
                    self.root / episode.data, "episode", (segment,), self.fps, camera, self.root, episode.name, self
                )
            return
        table = self.episodes.columns
        inside: defaultdict[int, list[int]] = defaultdict(list)
        for place, file in enumerate(table[f"{camera}/place"].tolist()):
            inside[file].append(place)
        for file, places in inside.items():
            segments = [self.segment(self.episodes[place], table[f"{camera}/start"][place].item()) for place in places]
            path = self.root / self.episodes.videos[camera][file]
            yield Source(path, "video", tuple(segments), self.fps, camera, self.root)

    # ------------------------------------------------------------------ metadata

    def _path(self, template: str, **fields: Any) -> str:
        return _inside(self.root, self.info[template].format(**fields))

    def _video_keys(self) -> list[str]:
        return [key for key in self.cameras if self.features[key]["dtype"] == "video"]

    def _table_v2(self) -> EpisodeTable:
        path = self.root / "meta" / "episodes.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DatasetError(f"{shown(path)} cannot be read: {error}") from error
        entries = [json.loads(line) for line in lines if line.strip()]
        numbers = [int(entry["episode_index"]) for entry in entries]
        size = int(self.info["chunks_size"])
        fields = [{"episode_index": number, "episode_chunk": number // size} for number in numbers]
        columns: dict[str, Any] = {
            "number": numbers,
            "length": [int(entry["length"]) for entry in entries],
            "place": range(len(entries)),
        }
        data, videos = Paths(self._path, "data_path", fields), {}
        for key in self._video_keys():
            videos[key] = Paths(self._path, "video_path", [{**each, "video_key": key} for each in fields])
            columns |= {f"{key}/place": range(len(entries)), f"{key}/start": [0.0] * len(entries)}
        return EpisodeTable({name: np.array(values) for name, values in columns.items()}, data, videos)

    def _table_v3(self) -> EpisodeTable:
        parquet = require_parquet()
        paths = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise DatasetError(f"{shown(self.root)}/meta/episodes holds no parquet file")
        names = {"number": "episode_index", "length": "length", "data/chunk": "data/chunk_index"}
        names["data/file"] = "data/file_index"
        for key in self._video_keys():
            names[f"{key}/start"] = f"videos/{key}/from_timestamp"
            names |= {f"{key}/{part}": f"videos/{key}/{part}_index" for part in ("chunk", "file")}
        parts = []
        for path in paths:  # the columns of statistics, which are by far the most, are not read
            table = parquet.read_table(path, columns=list(names.values()))
            parts.append({name: table.column(column).to_numpy() for name, column in names.items()})
        columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
        if any(np.isnan(values).any() for values in columns.values() if values.dtype.kind == "f"):
            raise DatasetError(f"{shown(self.root)}/meta/episodes has empty cells where an episode's place is expected")

        def files(prefix: str, template: str, **more: str) -> tuple[np.ndarray, Paths]:
            pairs = np.stack([columns.pop(f"{prefix}/{part}").astype(np.int64) for part in ("chunk", "file")], axis=1)
            unique, place = np.unique(pairs, axis=0, return_inverse=True)
            fields = [{"chunk_index": chunk, "file_index": file, **more} for chunk, file in unique.tolist()]
            return place.reshape(-1), Paths(self._path, template, fields)

        columns["place"], data = files("data", "data_path")
        videos = {}
        for key in self._video_keys():
            columns[f"{key}/place"], videos[key] = files(key, "video_path", video_key=key)
        integers = ("number", "length")
        return EpisodeTable(columns | {name: columns[name].astype(np.int64) for name in integers}, data, videos)


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
        raise DatasetError(f"{shown(root)}/{INFO} or its episodes name the file {path!r} outside of the dataset")
    return path


def _is_depth(key: str, feature: Mapping[str, Any]) -> bool:
    """Whether a camera gives depth: its `info` says so, it has one channel of more than 8 bits, or its name says so."""
    infos = [feature.get("info") or {}, feature.get("video_info") or {}]
    if any(info.get("is_depth_map") or info.get("video.is_depth_map") for info in infos):
        return True
    formats = {str(info.get("video.pix_fmt") or info.get("pix_fmt") or "") for info in infos}
    return "depth" in re.split(r"[^a-z]+", key.lower()) or any(re.match(r"gray(?!8|$)|y1\d", name) for name in formats)


def _rows_missing(path: Path, length: int, found: int) -> str:
    return f"{shown(path)} does not hold its frames 0 to {length - 1} in order, which the metadata say; it has {found}"


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
