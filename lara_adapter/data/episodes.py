"""The reader of the LeRobot dataset format, versions 2.0, 2.1 and 3.0: episodes, their columns and their frames.

A version 3.0 folder keeps many episodes in one parquet and one video file, and `meta/episodes/*/*.parquet` says where each
begins; version 2 has one of each per episode, and `meta/episodes.jsonl`. Plain pyarrow, JSON and PyAV.

Which rows belong to an episode is what the column `episode_index` says, never a sum of lengths: episodes may have been
deleted from the metadata, and numbers left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterFormatError, DatasetError
from ..storage.files import read_json
from ..storage.hub import locate_folder
from .dataset import Content, Dataset
from .episode_checks import check_rows, check_videos, rows_missing
from .episode_table import Episode, EpisodeTable, read_v2, read_v3
from .parquet import as_array, cell_bytes, require_parquet, row_groups
from .sources import Source, shown
from .video import VideoFile, decode_picture, require_av

__all__ = ["INFO", "STATE", "VERSIONS", "Episode", "EpisodeDataset", "cell_bytes", "require_parquet"]

logger = logging.getLogger(__name__)

INFO = "meta/info.json"
STATE = "observation.state"
VERSIONS = ("v2.0", "v2.1", "v3.0")
_ROWS = 64  # pictures held at once while a parquet file is read


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

    def __init__(self, source: str | os.PathLike[str], revision: str | None = None, argument: str = "dataset") -> None:
        try:
            self.root = locate_folder(source, revision, [INFO, "*"], "LeRobot dataset", "dataset")
        except AdapterFormatError as error:
            raise DatasetError(f"{argument}: {error}") from error
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
        self.left_out = {}
        self.unlisted: set[int] = set()
        try:
            self.fps = float(info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(info["features"])
            pictures = [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]
            self.depth = tuple(key for key in pictures if _is_depth(key, self.features[key]))
            self.cameras = tuple(key for key in pictures if key not in self.depth)
            self.episodes = (read_v3 if self.version == "v3.0" else read_v2)(self.root, info, self._video_keys())
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
        return f"{self.name} has {', '.join(self.cameras) or 'no camera'}{depth}; name one of them (--camera)"

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
            damaged |= check_rows(self)
        for camera in cameras:
            if self.features[camera]["dtype"] == "video":
                damaged = check_videos(self, camera) | damaged
        return dict(sorted(damaged.items()))

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
            table = parquet.read_table(
                path, columns=names, filters=[("episode_index", "==", episode.number)], partitioning=None
            )
        # pyarrow's errors derive from these
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"{shown(path)}: {' '.join(str(error).split())}") from error
        arrays = {}
        for name in names:
            try:
                arrays[name] = as_array(table.column(name))
            except ValueError as error:
                raise DatasetError(f"{shown(path)}, episode {episode.number}, column {name}: {error}") from error
        if not np.array_equal(arrays["frame_index"], np.arange(episode.length)):
            raise DatasetError(
                f"episode {episode.number}: {rows_missing(path, episode.length, len(arrays['frame_index']))}"
            )
        return {name: arrays[name] for name in columns}

    def actions(self, episode: Episode) -> np.ndarray | None:
        """The column `action` of an episode, [length, A] float64; None: the dataset has none, or not of numbers.

        Raises:
            DatasetError: it is damaged.
        """
        return self._numbers(episode, "action")

    def states(self, episode: Episode) -> np.ndarray | None:
        """See :meth:`Dataset.states`: the column `observation.state`, float64."""
        return self._numbers(episode, STATE)

    def tasks(self, episode: Episode) -> np.ndarray | None:
        """See :meth:`Dataset.tasks`: the column `task_index`."""
        numbers = self._numbers(episode, "task_index")
        return None if numbers is None else numbers[:, 0].astype(np.int64)

    def _numbers(self, episode: Episode, column: str) -> np.ndarray | None:
        if column not in self.features:
            return None
        values = self.rows(episode, [column])[column]
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
                groups = row_groups(file.metadata, episode.number)
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
            raise DatasetError(f"{shown(path)} holds {done} of the {episode.length} frames of episode {episode.number}")

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
            yield Source(path, "video", tuple(segments), self.fps, camera, self.root, dataset=self)

    def _video_keys(self) -> list[str]:
        return [key for key in self.cameras if self.features[key]["dtype"] == "video"]


def _is_depth(key: str, feature: Mapping[str, Any]) -> bool:
    """Whether a camera gives depth: its `info` says so, it has one channel of more than 8 bits, or its name says so."""
    infos = [feature.get("info") or {}, feature.get("video_info") or {}]
    if any(info.get("is_depth_map") or info.get("video.is_depth_map") for info in infos):
        return True
    formats = {str(info.get("video.pix_fmt") or info.get("pix_fmt") or "") for info in infos}
    return "depth" in re.split(r"[^a-z]+", key.lower()) or any(re.match(r"gray(?!8|$)|y1\d", name) for name in formats)
