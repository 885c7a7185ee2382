"""The work folder of a labelling: its plan, the labels of each episode, and the copy while it is built."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.episodes import EpisodeDataset
from ...data.prefetch import prefetch
from ...errors import AdapterFormatError, DatasetError, LaraArgumentError
from ...storage.files import read_json, replace_file, write_json, write_tensors
from ..model import LatentActionModel
from ..sequence import encode_sequence
from .labels import LabelSet
from .write import write_data_file, write_metadata

__all__ = ["check_disk", "differences", "fingerprint", "label_episodes", "open_work", "write_copy"]

logger = logging.getLogger(__name__)

PLAN, EPISODES, COPY = "plan.json", "episodes", "copy"
_NAMES = {"dataset.name", "lam.source"}  # their sha256 is compared
_SKIPPED = {".cache", ".git"}  # what a download or a clone leaves in a dataset's folder


def fingerprint(dataset: EpisodeDataset) -> str:
    """SHA-256 over a dataset's metadata and the names and sizes of its other files."""
    digest = hashlib.sha256()
    for path in _files(dataset.root):
        name = path.relative_to(dataset.root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        if name.startswith("meta/"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def differences(plan: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Where two plans differ, as text; empty if nowhere. Their results and the names of folders do not count."""
    flat, flat_other = _flat(json.loads(json.dumps(plan))), _flat(other)
    keys = sorted(key for key in flat.keys() | flat_other.keys() if flat.get(key) != flat_other.get(key))
    keys = [key for key in keys if key not in _NAMES and not key.startswith("result.")]
    return ", ".join(f"{key} {flat_other.get(key)!r} (now {flat.get(key)!r})" for key in keys)


def open_work(work: Path, plan: Mapping[str, Any]) -> None:
    """Begin a work folder, or go on with the one that an earlier run left.

    Raises:
        LaraArgumentError: the earlier run had other settings.
    """
    # a plan without any labels yet does not bind
    if (work / PLAN).is_file() and any((work / EPISODES).iterdir()):
        try:
            found = differences(plan, read_json(work / PLAN))
        except AdapterFormatError as error:
            raise LaraArgumentError(f"output: {error}; delete {work} to begin again") from error
        if found:
            raise LaraArgumentError(
                f"output: an unfinished labelling with other settings is in {work}: {found}. Finish it with those, or "
                "delete that folder to begin again"
            )
        return
    (work / EPISODES).mkdir(parents=True, exist_ok=True)
    write_json(work / PLAN, plan)


def check_disk(work: Path, labels: LabelSet, copies: bool, link: bool) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        work: the work folder.
        labels: of the dataset.
        copies: whether the dataset is copied, and not only the sidecar written.
        link: whether videos are linked.

    Raises:
        LaraArgumentError: too little space is left.
    """
    dataset, columns = labels.dataset, labels.columns
    needed = 2 * dataset.total_frames * (8 * columns.queries + 4 * columns.numbers)  # at most: per episode, and written
    for path in _files(dataset.root) if copies else ():
        if not (link and _is_large(path, dataset.root) and path.stat().st_dev == work.stat().st_dev):
            needed += path.stat().st_size
    free = shutil.disk_usage(work).free
    if needed > free:
        raise LaraArgumentError(
            f"output: about {needed / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free on the disk of "
            f"{work.parent}; free some, choose another disk, or write the sidecar alone"
        )


def label_episodes(labels: LabelSet, camera: str, model: LatentActionModel, settings: Mapping[str, Any]) -> int:
    """Label the episodes that have no labels yet.

    Args:
        labels: what is there already; the rest is written to its folder.
        camera: which camera.
        model: in eval mode, on the device to run on.
        settings: gap, batch_size and dtype of :func:`encode_sequence`, and latent_dtype.

    Returns:
        How many episodes had labels already.
    """
    from tqdm import tqdm

    dataset = labels.dataset
    arguments = {key: settings[key] for key in ("gap", "batch_size", "dtype")}
    missing = [episode for episode in dataset.episodes if labels.load(episode) is None]
    with tqdm(total=dataset.total_frames, unit="frame", desc="label", disable=None) as progress:
        progress.update(dataset.total_frames - sum(episode.length for episode in missing))
        for episode, frames in dataset.frames(camera, missing):
            ahead = prefetch(frames, 2 * settings["batch_size"])
            with contextlib.closing(ahead):
                latents = encode_sequence(model, _count_frames(ahead, progress), **arguments)
            if not torch.isfinite(latents.latent).all():
                raise DatasetError(
                    f"episode {episode.number}: the latent holds NaN or infinite values; the model has diverged"
                )
            latent = latents.latent.flatten(1).to(getattr(torch, settings["latent_dtype"]))
            tensors = {"indices": latents.indices, "latent": latent, "valid": latents.valid}
            write_tensors(labels.path(episode.number), tensors)
    return len(dataset.episodes) - len(missing)


def write_copy(labels: LabelSet, copy: Path, provenance: dict[str, Any], link: bool) -> None:
    """Build the labelled copy of a dataset.

    Args:
        labels: of every episode.
        copy: folder of the copy; what an earlier run left there is used or replaced.
        provenance: goes to `meta/lara.json` and into the parquet files.
        link: hard-link videos and pictures where the file system can.
    """
    dataset = labels.dataset
    for left in copy.rglob(".*.new-*") if copy.exists() else ():  # of a run killed while it wrote a file
        left.unlink()
    ours = {episode.data for episode in dataset.episodes}
    ours |= {path.relative_to(dataset.root).as_posix() for path in (dataset.root / "data").rglob("*.parquet")}
    for name in sorted(ours):
        write_data_file(labels, dataset.root / name, copy / name, provenance)
    ours |= set(write_metadata(labels, copy, provenance))
    for path in _files(dataset.root):
        name = path.relative_to(dataset.root).as_posix()
        if name not in ours:
            _link_or_copy(path, copy / name, link and _is_large(path, dataset.root))


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    """Hard-link a file, or copy it where that is not possible."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)  # the Hub's cache holds links to the files themselves
            return
        except OSError as error:
            logger.debug("%s is copied: %s", source, error)
    with replace_file(target) as fresh:
        shutil.copyfile(source, fresh)


def _is_large(path: Path, root: Path) -> bool:
    return path.relative_to(root).parts[0] in ("videos", "images")


def _files(root: Path) -> list[Path]:
    """Every file of a dataset, in a fixed order."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _SKIPPED)
        found += [Path(folder, name) for name in sorted(files)]
    return found


def _count_frames(frames: Iterator[np.ndarray], progress: Any) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame
        progress.update()


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in content.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return pairs
