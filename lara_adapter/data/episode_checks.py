"""What is wrong with the episodes of a LeRobot dataset, found without decoding a frame."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from .parquet import require_parquet
from .sources import shown
from .video import VideoFile

if TYPE_CHECKING:
    from .episodes import EpisodeDataset

__all__ = ["check_rows", "check_videos", "rows_missing"]

_OPENED = 8  # files whose headers are read at once


def check_videos(dataset: EpisodeDataset, camera: str) -> dict[int, str]:
    """Episodes whose video cannot be opened, or ends early by its header: number -> reason."""
    table = dataset.episodes.columns
    places, starts = table[f"{camera}/place"], table[f"{camera}/start"]
    files = dataset.episodes.videos[camera]

    def seconds(place: int) -> float | str:
        """How long a file is, inf where it does not say; or what is wrong with it."""
        try:
            with VideoFile(dataset.root / files[place]) as video:
                return video.stated_seconds or float("inf")
        except DatasetError as error:
            return str(error)

    damaged: dict[int, str] = {}
    used = np.unique(places).tolist()
    with ThreadPoolExecutor(_OPENED) as pool:
        for place, found in zip(used, pool.map(seconds, used)):
            inside = places == place
            ends = starts + table["length"] / dataset.fps
            short = inside if isinstance(found, str) else inside & (ends > found + 1.5 / dataset.fps)
            for number, end in zip(table["number"][short].tolist(), ends[short].tolist()):
                if isinstance(found, str):
                    damaged[number] = found
                    continue
                name = shown(dataset.root / files[place])
                damaged[number] = f"{name} ends after {found:.3f} s, but it needs frames up to {end:.3f} s"
    return damaged


def check_rows(dataset: EpisodeDataset) -> dict[int, str]:
    """Episodes whose frames are not all in their parquet file, in order: number -> reason. Fills `dataset.unlisted`."""
    parquet = require_parquet()
    table = dataset.episodes.columns
    damaged: dict[int, str] = {}
    listed = dict(zip(table["number"].tolist(), zip(table["length"].tolist(), table["place"].tolist())))
    for place in np.unique(table["place"]).tolist():
        path = dataset.root / dataset.episodes.data[place]
        mine = [number for number, (_, where) in listed.items() if where == place]
        try:
            read = parquet.read_table(path, columns=["episode_index", "frame_index"], partitioning=None)
            numbers, frames = (read.column(name).to_numpy() for name in ("episode_index", "frame_index"))
        # pyarrow's errors derive from these
        except (OSError, ValueError, KeyError) as error:
            damaged |= dict.fromkeys(mine, f"{shown(path)}: {' '.join(str(error).split())}")
            continue
        order = np.argsort(numbers, kind="stable")
        names, begins = np.unique(numbers[order], return_index=True)
        parts = dict(zip(names.tolist(), np.split(frames[order], begins[1:])))
        dataset.unlisted |= {name for name in parts if name not in listed and name not in dataset.left_out}
        for number in mine:
            found, length = parts.get(number, frames[:0]), listed[number][0]
            if not np.array_equal(found, np.arange(length)):
                damaged[number] = rows_missing(path, length, len(found))
    return damaged


def rows_missing(path: Path, length: int, found: int) -> str:
    """The text about an episode whose rows are not complete."""
    return f"{shown(path)} does not hold its frames 0 to {length - 1} in order, which the metadata say; it has {found}"
