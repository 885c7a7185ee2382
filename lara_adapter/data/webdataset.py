"""The reader of WebDataset shards: tar archives of videos or pictures.

With Python's own knowledge of tar: the package `webdataset` reads an archive from its start to its end, while training
needs any clip at any time.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import DatasetError
from .dataset import Content, Dataset
from .pictures import PictureDataset, files_in
from .sources import PICTURES, VIDEOS, Segment, Source, shown
from .tar import FileRange, Member, members
from .tar_clips import COMPRESSED, Stretch, parse_name, scan_shard
from .video import VideoFile

__all__ = ["WebDatasetShards"]

logger = logging.getLogger(__name__)

_SUFFIXES = (".tar", *COMPRESSED)
_FPS = 10.0
_VIDEO = -1  # instead of a number of pictures


class WebDatasetShards(PictureDataset):
    """Clips in tar archives; one, or a folder of them, read only.

    A member's key is its path up to the first dot of its name, as in WebDataset. An episode is, within one archive,

    - a video: `000001.mp4`; with several cameras `000001.left.mp4` and `000001.right.mp4`;
    - or the pictures of one key, numbered after it: `000001.0.jpg`, `000001.1.jpg`; with cameras `000001.left.0.jpg`;
    - or pictures whose keys differ in their last number alone: `clip7/0001.jpg` and `clip7/0002.jpg`, or `clip7_0001.jpg`
      and `clip7_0002.jpg`; with cameras `clip7/0001.left.jpg`.

    Frames are in the order of these numbers, episodes in the order of the archives' names and of their first members. A
    picture is not used, and that is said, if its key has no number, or is nothing but a number (`000001.jpg`, in no folder:
    as a rule unrelated pictures), or if it is alone in its clip. What a truncated archive lacks is said too. Members of
    other kinds are ignored. The one camera is called "video" or "image" where names give none.

    Args:
        path: an uncompressed .tar file, or a folder of them.
        fps: frames per second of pictures; None: 10. Videos state theirs.

    Raises:
        DatasetError: there is no such file, it is compressed, or holds no clip; or all clips are damaged.
    """

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a file is a tar archive by its name; or a folder holds some, and no videos or pictures beside them."""
        if path.is_file():
            return path.name.lower().endswith(_SUFFIXES)
        return bool(files_in(path, _SUFFIXES)) and not files_in(path, VIDEOS | PICTURES)

    def __init__(self, path: str | os.PathLike[str], fps: float | None = None) -> None:
        self.root = Path(path)
        self.name = shown(self.root.resolve().name)
        self._files = files_in(self.root, _SUFFIXES)
        if not self._files:
            raise DatasetError(f"{shown(self.root)} holds no .tar file")
        self._clips: list[str] = []
        self._places: list[int] = []  # the archive of each
        found: list[dict[str, Stretch]] = []
        damaged: dict[int, str] = {}
        singles: list[str] = []
        for place, file in enumerate(self._files):
            shard = scan_shard(file)
            if shard.damage:
                logger.warning("%s: %s; what is before is used", shown(file), shard.damage)
            if shard.cut:
                damaged[len(found) + list(shard.clips).index(shard.cut)] = f"{shown(file)}: {shard.damage}"
            singles += [f"{name} in {file.name}" for name in shard.singles]
            self._clips += shard.clips
            self._places += [place] * len(shard.clips)
            found += shard.clips.values()
        self._report_singles(singles, bool(found))
        self.cameras = tuple(sorted({camera for cameras in found for camera in cameras}))
        columns = {camera: column for column, camera in enumerate(self.cameras)}
        self._stretches = np.zeros(
            (len(found), len(columns), 3), np.int64
        )  # first byte, the one after the last, pictures
        for number, cameras in enumerate(found):
            for camera, each in cameras.items():
                self._stretches[number, columns[camera]] = (
                    each.start,
                    each.stop,
                    _VIDEO if each.is_video else each.count,
                )
        self._measure(fps, damaged)

    def _report_singles(self, singles: Sequence[str], has_clips: bool) -> None:
        if not singles and not has_clips:
            raise DatasetError(
                f"{shown(self.root)}: the archives hold no videos (.mp4, ...) and no pictures (.jpg, .png, ...)"
            )
        text = f"{len(singles)} pictures belong to no clip (the first: {shown(singles[0])})" if singles else ""
        if not has_clips:
            raise DatasetError(
                f"{shown(self.root)}: all {text}, so that there is no pair of frames; name a clip's clip7/0001.jpg, ..."
            )
        if singles:
            logger.warning("%s: %s and are not used", self.name, text)

    def _measure(self, fps: float | None, damaged: dict[int, str]) -> None:
        """The length of each clip, and the rate."""
        lengths, rates = [], []
        for number, stretches in enumerate(self._stretches):
            column = int(np.flatnonzero(stretches[:, 2])[0])
            lengths.append(max(0, int(stretches[column, 2])))
            if stretches[column, 2] == _VIDEO and number not in damaged:
                try:
                    with self._video(number, self.cameras[column]) as video:
                        lengths[-1] = video.length or video.count()
                        rates.append(video.fps)
                except DatasetError as error:
                    damaged[number] = str(error)
        self._picture_fps = _FPS if fps is None else float(fps)
        self.fps = rates[0] if rates else self._picture_fps
        if rates and max(rates) - min(rates) > 0.01:
            logger.warning(
                "%s: the videos have %g to %g frames per second; a gap in seconds is counted in frames of the first (%g)",
                self.name, min(rates), max(rates), self.fps,
            )  # fmt: skip
        elif not rates and fps is None:
            logger.info("%s: pictures state no rate: %g frames per second are assumed", self.name, _FPS)
        self.left_out = {}
        self._set_episodes(lengths)
        self.leave_out(damaged)

    def _file(self, number: int) -> Path:
        return self._files[self._places[number]]

    def _inside(self, number: int) -> str:
        return self._clips[number]

    def _count(self, number: int, camera: str) -> int:
        """Pictures; _VIDEO: it is a video; 0: there are none."""
        return int(self._stretches[number, self.cameras.index(camera), 2])

    def _members(self, number: int, camera: str) -> list[Member]:
        """The pictures of a clip in order, or its one video."""
        start, stop, count = self._stretches[number, self.cameras.index(camera)].tolist()
        if not count:
            raise ValueError(f"it has no {camera}")
        with self._file(number).open("rb") as file:
            found = [(parse_name(member.name), member) for member in members(file, start, stop)]
        mine = [
            (place.order, member) for place, member in found if place and place[:2] == (self._clips[number], camera)
        ]
        return [member for _, member in sorted(mine, key=lambda each: each[0])]

    def _content(self, number: int, camera: str) -> tuple[str, BinaryIO]:
        """Name and content of a video."""
        try:
            member = self._members(number, camera)[0]
            return member.name, cast(BinaryIO, FileRange(self._file(number), member.start, member.size))
        except (OSError, ValueError, IndexError) as error:
            raise DatasetError(f"{shown(self._file(number))}: {shown(self._clips[number])}: {error}") from error

    def _video(self, number: int, camera: str) -> VideoFile:
        name, content = self._content(number, camera)
        return VideoFile(self._file(number) / name, content)

    def open_inside(self, inside: str) -> BinaryIO:
        """See :meth:`Dataset.open_inside`: "3:left" is the video of that camera of episode 3."""
        number, _, camera = inside.partition(":")
        return self._content(int(number), camera)[1]

    def contents(self, camera: str, episode: Any, places: Sequence[int] | None = None) -> Iterator[Content]:
        """See :meth:`Dataset.contents`; of clips of pictures."""
        frame = 0
        try:
            pictures = self._members(episode.number, camera)
            if len(pictures) != episode.length:
                raise ValueError(f"{camera} has {len(pictures)} pictures, but the clip has {episode.length} frames")
            with self._file(episode.number).open("rb") as file:
                for frame in range(episode.length) if places is None else places:
                    file.seek(pictures[frame].start)
                    content = file.read(pictures[frame].size)
                    if len(content) < pictures[frame].size:
                        raise ValueError(f"{pictures[frame].name} is truncated")
                    yield content
        except (OSError, ValueError, IndexError) as error:
            raise DatasetError(f"{self._damaged(episode)}: frame {frame}: {error}") from error

    def frames(self, camera: str, episodes: Sequence[Any]) -> Iterator[tuple[Any, Iterator[np.ndarray]]]:
        """See :meth:`Dataset.frames`."""
        for episode in episodes:
            is_video = self._count(episode.number, camera) == _VIDEO
            yield episode, self._film(camera, episode) if is_video else self._decoded(camera, episode, None)

    def _film(self, camera: str, episode: Any) -> Iterator[np.ndarray]:
        try:
            with self._video(episode.number, camera) as video:
                yield from video.all_frames()
        except DatasetError as error:
            raise DatasetError(f"{self._damaged(episode)}: {error}") from error

    def pick(self, camera: str, episode: Any, places: Iterable[int]) -> dict[int, np.ndarray]:
        """See :meth:`Dataset.pick`."""
        if self._count(episode.number, camera) == _VIDEO:
            return Dataset.pick(self, camera, episode, places)
        return super().pick(camera, episode, places)

    def sources(self, camera: str) -> Iterator[Source]:
        """See :meth:`Dataset.sources`: one for each clip."""
        for episode in self.episodes:
            path, segment = self._file(episode.number), self.segment(episode, 0.0)
            if self._count(episode.number, camera) == _VIDEO:  # all of it, whatever its rate and its length
                segments = (Segment(segment.group, episode.number, -math.inf, math.inf, 0),)
                yield Source(path, "video", segments, self.fps, camera, self.root, f"{episode.number}:{camera}", self)
            else:
                segments = (segment._replace(stop=episode.length / self._picture_fps),)
                yield Source(path, "episode", segments, self._picture_fps, camera, self.root, episode.name, self)

    def check(self, cameras: Sequence[str], *, rows: bool = False) -> dict[int, str]:
        """See :meth:`Dataset.check`: cameras that are missing or cannot be opened, and counts that differ."""
        damaged: dict[int, str] = {}
        for camera in cameras:
            counts = self._stretches[self.episodes.numbers, self.cameras.index(camera), 2]
            wrong = (counts == 0) | ((counts > 0) & (counts != self.episodes.lengths))
            for place in np.flatnonzero(wrong).tolist():
                number, length, name, _ = self.episodes[place]
                have = (
                    f"has {counts[place]} pictures, but the clip has {length} frames" if counts[place] else "is missing"
                )
                damaged.setdefault(number, f"{name}: {camera} {have}")
            measured = (self._stretches[self.episodes.numbers, : self.cameras.index(camera), 2] == 0).all(axis=1)
            for place in np.flatnonzero((counts == _VIDEO) & ~measured).tolist():
                try:
                    with self._video(self.episodes[place].number, camera):
                        pass
                except DatasetError as error:
                    damaged.setdefault(self.episodes[place].number, str(error))
        return dict(sorted(damaged.items()))
