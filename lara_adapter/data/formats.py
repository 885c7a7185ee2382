"""Which format a path has: the one place that knows all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DatasetError, LaraArgumentError
from ..storage.files import kind_of
from ..storage.hub import is_repo_id
from .dataset import Dataset
from .episodes import INFO, EpisodeDataset
from .files import FileDataset
from .hdf5 import Hdf5Dataset
from .pictures import files_in
from .rlds import RldsDataset
from .sources import PICTURES, VIDEOS, Source, list_pictures, natural_key, shown
from .webdataset import WebDatasetShards

__all__ = ["find_sources", "open_dataset"]

_PICTURE_FPS = 30.0
_EXPECTED = (
    f"{INFO} (a LeRobot dataset), features.json (RLDS), .hdf5 files (robomimic, LIBERO), .tar files (WebDataset), "
    f"videos ({', '.join(sorted(VIDEOS))}) or folders of pictures ({', '.join(sorted(PICTURES))})"
)


def open_dataset(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    picture_fps: float | None = None,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
    argument: str = "dataset",
) -> Dataset:
    """Open whatever holds episodes.

    Args:
        source: a dataset of the LeRobot format (folder or Hub id), RLDS, HDF5, WebDataset, a folder of videos and
            pictures (searched below too), or one file.
        revision: of a dataset on the Hub.
        picture_fps: frames per second of pictures; None: what the format states, else 30 for folders and 10 for others.
        episodes: numbers of those to use, as "7" or "0:50"; none: all. Files are numbered in the order of their names.
        skip: numbers of those not to use.
        argument: what the caller calls the source, for messages.

    Raises:
        DatasetError: there is nothing that can be read.
        LaraArgumentError: no such episode.
    """
    path = Path(source)
    dataset = _open(path, picture_fps) if path.exists() else EpisodeDataset(source, revision, argument)
    if episodes or skip:
        dataset.select(episodes, skip)
    return dataset


def _open(path: Path, fps: float | None) -> Dataset:
    found = list(_below(path, set(), fps))
    inner = [each for each in found if isinstance(each, Dataset)]
    if inner:
        if len(inner) == len(found) == 1:
            return inner[0]
        names = ", ".join(shown(each.root) for each in inner[:3])
        raise DatasetError(f"{shown(path)} holds {len(found)} collections, among them {names}; name one of them")
    sources = [each for each in found if isinstance(each, Source)]
    if not sources:
        known = kind_of(path)
        is_known = f"; it is {known}" if known else ""
        raise DatasetError(f"{shown(path)} holds nothing that can be read{is_known}. Expected: {_EXPECTED}")
    return FileDataset(path, sources)


def find_sources(
    folders: Sequence[str | os.PathLike[str]],
    *,
    cameras: Sequence[str] = (),
    picture_fps: float | None = None,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> list[Source]:
    """Find everything below some folders that gives frames.

    Besides the datasets that :func:`open_dataset` knows, each video is a source, and each folder that directly holds two
    pictures or more. Links are followed, hidden folders are not.

    Args:
        folders: folders, single files, or Hub ids of LeRobot datasets.
        cameras: names of the cameras to take from datasets, with or without `observation.images.`; empty: all.
        picture_fps: as for :func:`open_dataset`.
        episodes: of the one dataset that is found, the numbers of those to use, as "7" or "0:50"; none: all.
        skip: numbers of those not to use.

    Returns:
        The sources in an order that does not depend on the file system.

    Raises:
        LaraArgumentError: a folder does not exist and is no Hub id, a dataset has no camera or episode of these names, or
            there are several datasets and `episodes` or `skip`.
        DatasetError: the metadata of a dataset are damaged.
        HubError: a dataset cannot be loaded from the Hub.
    """
    found: list[Source | Dataset] = []
    visited: set[str] = set()
    for folder in folders:
        if (path := Path(folder)).exists():
            found.extend(_below(path, visited, picture_fps))
        elif is_repo_id(str(folder)):
            found.append(EpisodeDataset(folder))
        else:
            raise LaraArgumentError(
                f"{shown(path)} does not exist; a folder of videos or datasets, one file, or the Hub id of a LeRobot "
                "dataset is expected"
            )
    if episodes or skip:
        if len(found) > 1 and all(isinstance(each, Source) for each in found):
            found = [FileDataset(Path(folders[0]), [each for each in found if isinstance(each, Source)])]
        if len(found) != 1 or not isinstance(found[0], Dataset):
            raise LaraArgumentError(
                f"episodes and skip number the episodes of one dataset, but {len(found)} datasets and videos were found"
            )
        found[0].select(episodes, skip)
    datasets = [each for each in found if isinstance(each, Dataset)]
    unknown = [name for name in cameras if not any(each.has_camera(name) for each in datasets)]
    if unknown:
        there = sorted({camera for each in datasets for camera in each.cameras if camera})
        raise LaraArgumentError(
            f"cameras={list(cameras)}: nothing here has {', '.join(unknown)}; "
            + (
                f"there are {', '.join(there)}"
                if there
                else "plain videos have one camera without a name, leave it out"
            )
        )
    sources: list[Source] = []
    for each in found:
        if isinstance(each, Source):
            sources.append(each)
        else:
            for camera in each.select_cameras([name for name in cameras if each.has_camera(name)] or cameras):
                sources.extend(each.sources(camera))
    return sources


def _dataset_at(path: Path, fps: float | None) -> Dataset | None:
    """The dataset that a folder or file is; None: it is none itself."""
    if (path / INFO).is_file():
        return EpisodeDataset(path)
    if RldsDataset.recognises(path):
        return RldsDataset(path, fps)
    if path.is_dir() and files_in(path, VIDEOS | PICTURES):  # of a mixed folder each file is one
        return None
    for kind in (Hdf5Dataset, WebDatasetShards):
        if kind.recognises(path):
            return kind(path, fps)
    return None


def _below(path: Path, visited: set[str], fps: float | None) -> Iterator[Source | Dataset]:
    """Datasets, videos and folders of pictures in one folder tree; or the one file."""
    real = os.path.realpath(path)
    if real in visited:  # links can lead in a circle
        return
    visited.add(real)
    dataset = _dataset_at(path, fps)
    if dataset is not None:
        yield dataset
        return
    if not path.is_dir():
        # one that is not of the layout is refused by its reader, which says why
        yield Hdf5Dataset(path, fps) if path.suffix.lower() in (".h5", ".hdf5") else Source(path)
        return
    entries = sorted((entry for entry in path.iterdir() if entry.name[0] != "."), key=lambda e: natural_key(e.name))
    if len(list_pictures(path)) > 1:
        yield Source(path, "pictures", fps=fps or _PICTURE_FPS)
    folders = [entry for entry in entries if entry.is_dir()]
    for entry in entries:
        if entry in folders:
            continue
        if entry.suffix.lower() in VIDEOS:
            yield Source(entry)
        elif (inner := _dataset_at(entry, fps)) is not None:
            yield inner
    for entry in folders:
        yield from _below(entry, visited, fps)
