"""What every format of episodes offers, whatever its files look like: cameras, frames, actions, and which to use."""

from __future__ import annotations

import abc
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import DatasetError, LaraArgumentError
from .sources import Segment, Source, shown

__all__ = ["Content", "Dataset", "EpisodeLike", "parse_numbers", "ranges", "runs", "shown"]

logger = logging.getLogger(__name__)

_IMAGES = "observation.images."

Content = Any  # a picture on disk: the bytes of a picture file, or RGB [H, W, 3] uint8


class EpisodeLike(NamedTuple):
    """One episode; a format may have a class of its own with these three."""

    number: int  # its index: from 0 on, not always without holes
    length: int  # frames
    name: str  # as messages call it: "episode 3", the file's name
    place: Any = None  # where it is, for the reader of its format


class Dataset(abc.ABC):
    """Episodes on disk, read only.

    A damaged episode is the same to every command: it is named with its reason in one warning and left out, before the
    work where that is seen without decoding (:meth:`check`). Only if none is left there is an error.

    Attributes:
        root: the folder or file.
        name: what messages call it: Hub id, or the folder's name.
        fps: frames per second.
        cameras: keys of the cameras.
        episodes: those that are used, in ascending order of their numbers.
        left_out: number -> why, of episodes that are damaged.
    """

    root: Path
    name: str
    fps: float
    cameras: tuple[str, ...]
    episodes: Sequence[Any]
    left_out: dict[int, str]

    @abc.abstractmethod
    def frames(self, camera: str, episodes: Sequence[Any]) -> Iterator[tuple[Any, Iterator[np.ndarray]]]:
        """Episodes, and an iterator over the frames [H, W, 3] uint8 of each, to be used up before the next is asked for.

        The iterator raises DatasetError where the episode is damaged.
        """

    @abc.abstractmethod
    def sources(self, camera: str) -> Iterator[Source]:
        """The frames of a camera for training; without decoding, and with the episodes that are used alone."""

    def contents(self, camera: str, episode: Any, places: Sequence[int] | None = None) -> Iterator[Content]:
        """The pictures of an episode in order, undecoded; for kind "episode" of :class:`Source`.

        Args:
            camera: one of `cameras`.
            episode: one of `episodes`.
            places: numbers of frames, rising; None: all.

        Raises:
            DatasetError: the episode is damaged: something is missing or cannot be read.
        """
        raise NotImplementedError

    def open_inside(self, inside: str) -> BinaryIO:
        """The video of that name inside of a file; for kind "video" of :class:`Source` with `inside`."""
        raise NotImplementedError

    def actions(self, episode: Any) -> np.ndarray | None:
        """The actions of an episode, [length, A] of a float type; None: the dataset has none.

        Raises:
            DatasetError: they are damaged, or are not numbers.
        """
        return None

    def known_actions(self, episode: Any) -> np.ndarray:
        """The actions of an episode of a dataset that has to have them, as of :meth:`actions`.

        Raises:
            DatasetError: they are damaged or not finite.
            LaraArgumentError: the dataset has none.
        """
        actions = self.actions(episode)
        if actions is None:
            raise LaraArgumentError(f"actions: {self.name} does not have a column 'action' of numbers")
        if not np.isfinite(actions).all():
            raise DatasetError("its actions are not finite")
        return actions

    def states(self, episode: Any) -> np.ndarray | None:
        """The robot's state at each frame, [length, K] of a float type; None: the format or the dataset has none.

        Raises:
            DatasetError: they are damaged.
        """
        return None

    def tasks(self, episode: Any) -> np.ndarray | None:
        """The number of the task at each frame, [length] int; None: the format or the dataset has none.

        Raises:
            DatasetError: they are damaged.
        """
        return None

    def check(self, cameras: Sequence[str], *, rows: bool = False) -> dict[int, str]:
        """What is wrong with the episodes, found without decoding: number -> reason.

        Args:
            cameras: whose files are looked at.
            rows: whether the columns of frames are needed too.
        """
        return {}

    def pick(self, camera: str, episode: Any, places: Iterable[int]) -> dict[int, np.ndarray]:
        """Some frames of an episode, decoded up to the last one.

        Returns:
            Number -> frame [H, W, 3] uint8, without those past its end.

        Raises:
            DatasetError: the episode is damaged.
        """
        rest = set(places)
        found: dict[int, np.ndarray] = {}
        if not rest:
            return found
        for _, frames in self.frames(camera, [episode]):
            for place, frame in enumerate(frames):
                if place in rest:
                    found[place] = frame
                    rest.remove(place)
                    if not rest:
                        return found
        return found

    def segment(self, episode: Any, start: float) -> Segment:
        """Where an episode is in a source, from that second on."""
        group = f"{self.root}#{episode.number}"
        return Segment(group, episode.number, start, start + episode.length / self.fps, episode.length)

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return sum(episode.length for episode in self.episodes)

    def episode(self, number: int) -> Any:
        """The episode of that number; None if there is none."""
        return next((episode for episode in self.episodes if episode.number == number), None)

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
            LaraArgumentError: there is none of one of these names.
        """
        if not all(map(self.has_camera, names)):
            raise LaraArgumentError(f"cameras={list(names)}, but {self._choice()}")
        return self._named(names) if names else self.cameras

    def has_camera(self, name: str) -> bool:
        """Whether there is a camera of that name, with or without "observation.images."."""
        return bool(self._named([name]))

    def _named(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(key for key in self.cameras if key in names or key.removeprefix(_IMAGES) in names)

    def _choice(self) -> str:
        return f"{self.name} has {', '.join(self.cameras) or 'no camera'}; name one of them (--camera)"

    def select(self, episodes: Sequence[str] = (), skip: Sequence[str] = ()) -> None:
        """Use only some of the episodes.

        Args:
            episodes: their numbers, each as "7" or as a range "0:50" without its end; none: all.
            skip: of these, the ones to leave out.

        Raises:
            LaraArgumentError: a text is neither, or names no episode of the dataset; or none is left.
        """
        numbers = [episode.number for episode in self.episodes]
        wanted = parse_numbers("episodes", episodes, numbers) if episodes else set(numbers)
        wanted -= parse_numbers("skip", skip, numbers)
        if not wanted:
            raise LaraArgumentError(f"episodes={list(episodes)}, skip={list(skip)}: no episode of {self.name} is left")
        self._keep(wanted)

    def _keep(self, numbers: Set[int]) -> None:
        self.episodes = [episode for episode in self.episodes if episode.number in numbers]

    def leave_out(self, damaged: Mapping[int, str]) -> None:
        """Go on without damaged episodes, and say so once.

        Raises:
            DatasetError: no episode is left.
        """
        if not damaged:
            return
        self.left_out |= damaged
        total, kept = len(self.episodes), {episode.number for episode in self.episodes} - damaged.keys()
        reasons = "; ".join(f"episode {number}: {reason}" for number, reason in list(damaged.items())[:3])
        reasons += "; ..." if len(damaged) > 3 else ""
        if not kept:
            raise DatasetError(f"{self.name}: every episode is damaged: {reasons}")
        logger.warning(
            "%s: %d of %d episodes %s damaged and left out: %s (%s)",
            self.name, len(damaged), total, "is" if len(damaged) == 1 else "are", ranges(damaged), reasons,
        )  # fmt: skip
        self._keep(kept)


def parse_numbers(argument: str, texts: Sequence[str], known: Sequence[int]) -> set[int]:
    """The members of `known` that texts name: "7", or "0:50", ":50", "50:" without the end.

    Raises:
        LaraArgumentError: a text is neither, or names none of them.
    """
    found: set[int] = set()
    for text in texts:
        start, colon, stop = str(text).partition(":")
        try:
            first = int(start) if start or not colon else min(known, default=0)
            last = int(stop) if stop else (max(known, default=0) + 1 if colon else first + 1)
        except ValueError:
            raise LaraArgumentError(
                f'{argument}: {text!r}, but a number ("7") or a range ("0:50") is expected'
            ) from None
        inside = {number for number in known if first <= number < last}
        if not inside:
            raise LaraArgumentError(f"{argument}: {text!r} names none of the episodes {ranges(known)}")
        found |= inside
    return found


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers as runs [first, stop] without the stop: [[0, 5], [7, 8]]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1]:
            parts[-1][1] += 1
        else:
            parts.append([number, number + 1])
    return parts


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: "0 to 4, 7, 9 to 12"."""
    texts = [str(first) if stop == first + 1 else f"{first} to {stop - 1}" for first, stop in runs(numbers)]
    return ", ".join(texts[:20]) + (", ..." if len(texts) > 20 else "")
