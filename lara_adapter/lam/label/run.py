"""Latent-action tokens and continuous latents of every frame of a LeRobot-format dataset.

The labels of each episode are first kept in a file of their own, in a hidden folder beside the output. When all exist,
the copy (or the sidecar) is written in that folder and renamed to the output. A run can be killed at any time and
resumes where it was, and the output is either complete or missing.

    .OUTPUT.labelling/plan.json            what is being labelled, by which model
    .OUTPUT.labelling/episodes/000012.safetensors
    .OUTPUT.labelling/copy/                the copy while it is built
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..._version import __version__
from ...data.episodes import EpisodeDataset, require_parquet
from ...data.gap import parse_gap
from ...errors import AdapterFormatError, LaraArgumentError
from ...storage.files import read_json
from ..identity import open_model
from ..sequence import check_settings, choose_device
from .labels import LabelColumns, LabelSet
from .work import COPY, EPISODES, check_disk, differences, fingerprint, label_episodes, open_work, write_copy
from .write import PROVENANCE, SCHEMA_KEY, write_sidecar

__all__ = ["LabelReport", "label_dataset"]

logger = logging.getLogger(__name__)

FORMAT, SCHEMA_VERSION = "lara_adapter.labels", 1


class LabelReport(NamedTuple):
    """What was done."""

    output: str  # the copy or the sidecar
    episodes: int  # labelled, those of an earlier run included
    frames: int  # in them
    resumed: int  # episodes that an earlier run had labelled
    invalid: int  # frames whose future lies past the end of their episode
    codes_used: int  # codes chosen at least once, in valid frames
    features: tuple[str, ...]  # names of the columns


def label_dataset(
    dataset: str | os.PathLike[str],
    lam: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    gap: str | int,
    camera: str | None = None,
    sidecar: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    latent_dtype: Literal["float32", "float16"] = "float32",
    prefix: str = "lara",
    link: bool = True,
    revision: str | None = None,
    dataset_revision: str | None = None,
) -> LabelReport:
    """Label every frame t of a dataset with the latent action from frame t to frame t + C of its episode.

    Writes a copy of the dataset with the features PREFIX.indices int64 [N], PREFIX.latent [N * D] (token by token) and
    PREFIX.valid bool [1], their statistics, and their provenance in `meta/lara.json`. Where t + C is past the end of the
    episode, the last frame is used instead and valid is False. Frames are resized to the model's size without keeping
    the aspect ratio, as :meth:`LatentActionModel.encode` does.

    The same call resumes a killed run, and gives the same bytes on the same machine. Each frame is decoded and encoded
    once.

    Args:
        dataset: folder or Hub id of a dataset in the LeRobot format, version 2.0, 2.1 or 3.0; never written to.
        lam: folder or Hub id of a latent action model.
        output: folder of the copy; with `sidecar` a file that ends in .parquet.
        gap: C, in frames ("16") or seconds ("0.5s"): what the model was trained with.
        camera: key of the camera; None: the only one.
        sidecar: write only a parquet file with the columns episode_index, frame_index, index, indices, latent, valid.
        batch_size: frames encoded at once; other sizes give the same labels up to rounding.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: the model runs in float32 or under bfloat16 autocast.
        latent_dtype: precision of the stored latent.
        prefix: the features are PREFIX.indices, PREFIX.latent and PREFIX.valid.
        link: hard-link videos where the file system can, instead of copying them.
        revision: commit, tag or branch of the model on the Hub.
        dataset_revision: commit, tag or branch of the dataset on the Hub.

    Raises:
        DatasetError: the dataset is missing, damaged, or of an unknown version.
        AdapterFormatError: the model is missing or damaged.
        LaraArgumentError: no such camera, an argument out of range, an output that is not ours, too little disk space,
            or an unfinished labelling with other settings.
    """
    if latent_dtype not in ("float32", "float16"):
        raise LaraArgumentError(f"latent_dtype={latent_dtype!r}, but float32 or float16 is expected")
    if not prefix or "/" in prefix:
        raise LaraArgumentError(
            f'prefix={prefix!r}, but a name without "/" is expected, as LeRobot demands of features'
        )
    source = EpisodeDataset(dataset, dataset_revision)
    view = source.camera(camera)
    frames = parse_gap(gap).in_frames(source.fps)
    check_settings(frames, batch_size, dtype)
    place = choose_device(device)
    target = _check_output(Path(output), source, sidecar)
    model, identity = open_model(lam, revision)
    columns = LabelColumns(prefix, *model.latent_shape, latent_dtype)
    taken = sorted(set(columns.names) & set(source.features))
    if taken and not sidecar:
        raise LaraArgumentError(
            f"prefix={prefix!r}: {source.name} has {', '.join(taken)} already; choose another prefix"
        )
    plan = _plan(source, identity, view, frames, dtype, columns)
    work = target.parent / f".{target.name}.labelling"
    if target.exists():
        result = _finished(target, plan, sidecar)["result"]
        logger.warning("%s is there already, from the same dataset, model and settings: nothing to do", target)
        shutil.rmtree(work, ignore_errors=True)  # of a run killed right after the rename
        return LabelReport(str(target), resumed=result["episodes"], features=columns.names, **result)
    open_work(work, plan)
    labels = LabelSet(work / EPISODES, source, columns)
    check_disk(work, labels, not sidecar, link)
    settings = {"gap": frames, "batch_size": batch_size, "dtype": dtype, "latent_dtype": latent_dtype}
    resumed = label_episodes(labels, view, model.to(place), settings)
    invalid, used = 0, set()
    for episode in source.episodes:
        own = labels.get(episode.number)
        invalid += int((~own.valid).sum())
        used |= set(np.unique(own.indices[own.valid]).tolist())
    totals = {"episodes": len(source.episodes), "frames": source.total_frames}
    result = {**totals, "invalid": invalid, "codes_used": len(used)}
    provenance = {**plan, "result": result}
    if sidecar:
        write_sidecar(labels, work / COPY, provenance)
    else:
        write_copy(labels, work / COPY, provenance, link)
    os.replace(work / COPY, target)
    shutil.rmtree(work)
    return LabelReport(str(target), resumed=resumed, features=columns.names, **result)


def _check_output(target: Path, source: EpisodeDataset, sidecar: bool) -> Path:
    """The absolute output; refuses what could harm the source or is of the wrong kind."""
    target, root = target.absolute(), source.root.resolve()
    if sidecar and target.suffix != ".parquet":
        raise LaraArgumentError(f"output={str(target)!r}, but with sidecar a file that ends in .parquet is expected")
    resolved = target.resolve()
    if resolved == root or root in resolved.parents or resolved in root.parents:
        raise LaraArgumentError(f"output={str(target)!r} is, holds or lies in the dataset {root}; choose another place")
    return target


def _plan(
    source: EpisodeDataset, identity: dict[str, Any], camera: str, gap: int, dtype: str, columns: LabelColumns
) -> dict[str, Any]:
    """The provenance, without the result."""
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "lara_adapter": __version__,
        "lam": identity,
        "dataset": {"name": source.name, "version": source.version, "sha256": fingerprint(source)},
        "camera": camera,
        "gap_frames": gap,
        "gap_seconds": gap / source.fps,
        "dtype": dtype,
        "preprocessing": f"resized to {identity['image_size']} x {identity['image_size']}, bilinear with antialiasing",
        "past_the_end": "the last frame of the episode stands in, and valid is False",
        "features": {name: f"{entry['dtype']} {entry['shape']}" for name, entry in columns.features.items()},
    }


def _finished(target: Path, plan: dict[str, Any], sidecar: bool) -> dict[str, Any]:
    """The provenance of an output that exists already.

    Raises:
        LaraArgumentError: it is not ours, or was made otherwise.
    """
    try:
        if sidecar:
            metadata = require_parquet().read_schema(target).metadata or {}
            content: dict[str, Any] = json.loads(metadata[SCHEMA_KEY])
        else:
            content = read_json(target / PROVENANCE)
        result = content["result"]
    # pyarrow's errors derive from these
    except (AdapterFormatError, OSError, ValueError, KeyError, TypeError) as error:
        raise LaraArgumentError(
            f"output: {target} exists, and is not a labelling of ours ({type(error).__name__}); choose another"
        ) from error
    found = differences(plan, content)
    if found or not isinstance(result, dict):
        raise LaraArgumentError(
            f"output: {target} exists and was made otherwise: {found}; choose another, or delete it"
        )
    return content
