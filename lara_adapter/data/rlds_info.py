"""What features.json and dataset_info.json of tensorflow-datasets say: the features of a step, and the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterFormatError, DatasetError
from ..storage.files import read_json
from .pictures import files_in
from .sources import natural_key, shown

__all__ = ["FEATURES", "Stated", "find_folder", "is_camera", "is_version", "list_shards", "read_steps", "width"]

FEATURES, _INFO = "features.json", "dataset_info.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

Stated = Mapping[str, Any]  # a feature as features.json states it


def read_steps(folder: Path) -> dict[str, Stated]:
    """The features of a step, by their names in a record ("steps/observation/image").

    Raises:
        DatasetError: the file is damaged, or it has no steps.
    """
    try:
        stated = dict(_flatten(read_json(folder / FEATURES), ""))
    except (AdapterFormatError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{shown(folder / FEATURES)} is damaged: {error}") from error
    steps = {name: feature for name, feature in stated.items() if name.startswith("steps/")}
    if not steps:
        raise DatasetError(
            f"{shown(folder / FEATURES)} has no steps, but {', '.join(stated) or 'nothing'}: a dataset of episodes (RLDS) "
            "is expected"
        )
    return steps


def find_folder(path: Path) -> Path | None:
    """The folder with features.json: of a version, of the newest version in it, or around a file."""
    folder = path.parent if path.is_file() else path
    if (folder / FEATURES).is_file():
        return folder
    if not path.is_dir():
        return None
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if is_version(entry.name)]
    versions = [path / name for name in sorted(names, key=natural_key) if (path / name / FEATURES).is_file()]
    return versions[-1] if versions else None


def is_version(name: str) -> bool:
    """Whether a folder is named like a version: "1.0.0"."""
    return re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", name) is not None


def list_shards(folder: Path, only: str | None) -> list[tuple[Path, int | None]]:
    """The TFRecord files, and how many episodes each should have."""
    try:
        info = read_json(folder / _INFO) if (folder / _INFO).is_file() else {}
        kind = info.get("fileFormat", "tfrecord")
        if kind != "tfrecord":
            raise DatasetError(f"{shown(folder)} is stored as {kind}, but tfrecord can be read: prepare it as that")
        stated = [shard for split in info.get("splits", []) for shard in _split_shards(folder, info, split)]
    except (AdapterFormatError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{shown(folder / _INFO)} is damaged: {error}") from error
    found: list[tuple[Path, int | None]] = [(path, None) for path in files_in(folder, [""]) if ".tfrecord" in path.name]
    if any(path.is_file() for path, _ in stated):
        found = stated
    return [(path, expected) for path, expected in found if only in (None, path.name)]


def _split_shards(folder: Path, info: Mapping[str, Any], split: Mapping[str, Any]) -> Iterator[tuple[Path, int | None]]:
    lengths = [int(length) for length in split.get("shardLengths", [])]
    for place, length in enumerate(lengths):
        shard = f"{place:05d}-of-{len(lengths):05d}"
        name = str(split.get("filepathTemplate", _TEMPLATE))
        parts = {"DATASET": info["name"], "SPLIT": split["name"], "FILEFORMAT": "tfrecord", "SHARD_X_OF_Y": shard}
        for key, value in parts.items():
            name = name.replace(f"{{{key}}}", value)
        if Path(name).name != name:
            raise DatasetError(f"{shown(folder / _INFO)} names the file {name!r} outside of the dataset")
        yield folder / name, length


def _flatten(feature: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The features of features.json by their names in a record; a list within a step is left out."""
    if "featuresDict" in feature:
        for name, inner in feature["featuresDict"]["features"].items():
            yield from _flatten(inner, f"{path}/{name}".lstrip("/"))
    elif "sequence" in feature:
        if path == "steps":
            yield from _flatten(feature["sequence"]["feature"], path)
    else:
        yield path, feature


def is_camera(image: Stated) -> bool:
    """Whether an image feature holds RGB pictures."""
    shape = image.get("shape", {}).get("dimensions", ["3"])
    return image.get("dtype", "uint8") == "uint8" and int(shape[-1]) == 3


def width(feature: Stated) -> int:
    """Numbers per step of a feature; 0: it has no fixed number of them."""
    tensor = feature.get("tensor")
    if tensor is None or tensor.get("dtype") == "string":
        return 0
    sizes = [int(size) for size in tensor.get("shape", {}).get("dimensions", [])]
    return int(np.prod(sizes, dtype=np.int64)) if all(size > 0 for size in sizes) else 0
