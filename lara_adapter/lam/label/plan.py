"""What a labelling is: its plan, by which unfinished work and finished outputs are told apart; the result beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...data.dataset import Dataset
from ...data.episodes import EpisodeDataset
from ...data.parquet import require_parquet
from ...errors import AdapterFormatError, LaraArgumentError
from ...storage.files import read_json
from .labels import LabelColumns

__all__ = ["PROVENANCE", "SCHEMA_KEY", "dataset_files", "differences", "make_plan", "read_result"]

FORMAT, SCHEMA_VERSION = "lara_adapter.labels", 1
PROVENANCE = "meta/lara.json"
SCHEMA_KEY = b"lara_adapter"  # of the parquet files' schema metadata: the provenance as JSON
_NAMES = {"dataset.name", "lam.source", "actions_from.name"}  # their sha256 is compared
_SKIPPED = {".cache", ".git"}  # what a download or a clone leaves in a dataset's folder


def make_plan(
    source: Dataset, identity: dict[str, Any], camera: str, gap: int, dtype: str, columns: LabelColumns,
    demonstrations: Dataset | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The provenance of labels, without the result: JSON-able, the same in every process and shard."""
    version = {"version": source.version} if isinstance(source, EpisodeDataset) else {}
    decoded = {}
    if demonstrations is not None:
        decoded["actions_from"] = {"name": demonstrations.name, "sha256": _fingerprint(demonstrations)}
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "lara_adapter": __version__,
        "lam": identity,
        "dataset": {"name": source.name, **version, "sha256": _fingerprint(source)},
        "camera": camera,
        "gap_frames": gap,
        "gap_seconds": gap / source.fps,
        "dtype": dtype,
        "preprocessing": f"resized to {identity['image_size']} x {identity['image_size']}, bilinear with antialiasing",
        "past_the_end": "the last frame of the episode stands in, and valid is False",
        "features": {name: f"{entry['dtype']} {entry['shape']}" for name, entry in columns.features.items()},
        **decoded,
    }


def differences(plan: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Where two plans differ, as text; empty if nowhere. Their results and the names of folders do not count."""
    flat, flat_other = _flat(json.loads(json.dumps(plan))), _flat(other)
    keys = sorted(key for key in flat.keys() | flat_other.keys() if flat.get(key) != flat_other.get(key))
    keys = [key for key in keys if key not in _NAMES and not key.startswith("result.")]
    return ", ".join(f"{key} {flat_other.get(key)!r} (now {flat.get(key)!r})" for key in keys)


def read_result(target: Path, plan: Mapping[str, Any], sidecar: bool) -> dict[str, Any]:
    """The result in the provenance of an output that exists already.

    Raises:
        LaraArgumentError: the output is not ours, or was made otherwise.
    """
    try:
        if sidecar:
            metadata = require_parquet().read_schema(target).metadata or {}
            content: dict[str, Any] = json.loads(metadata[SCHEMA_KEY])
        else:
            content = read_json(target / PROVENANCE)
        result: dict[str, Any] = dict(content["result"])
    # pyarrow's errors derive from these
    except (AdapterFormatError, OSError, ValueError, KeyError, TypeError) as error:
        raise LaraArgumentError(
            f"output: {target} exists, and is not a labelling of ours ({type(error).__name__}); choose another"
        ) from error
    if found := differences(plan, content):
        raise LaraArgumentError(
            f"output: {target} exists and was made otherwise: {found}; choose another, or delete it"
        )
    return result


def dataset_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file of a dataset in a fixed order: its path relative to the dataset with "/", and its path."""
    if root.is_file():
        yield root.name, root
        return
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _SKIPPED)
        for path in (Path(folder, name) for name in sorted(files)):
            if path.is_file():  # and no link that leads nowhere
                yield path.relative_to(root).as_posix(), path


def _fingerprint(dataset: Dataset) -> str:
    """SHA-256 over a dataset's metadata and the names and sizes of its other files."""
    digest = hashlib.sha256()
    for name, path in dataset_files(dataset.root):
        digest.update(os.fsencode(name) + f"\0{path.stat().st_size}\0".encode())
        if name.startswith("meta/") and isinstance(dataset, EpisodeDataset):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in content.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return pairs
