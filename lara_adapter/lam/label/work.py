"""The work folder of a labelling, and the labelling of episodes into it."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.dataset import Dataset
from ...data.prefetch import prefetch
from ...errors import AdapterFormatError, DatasetError, LaraArgumentError
from ...storage.files import read_json, write_json, write_tensors
from ..model import LatentActionModel
from ..sequence import SequenceLatents, encode_sequence
from .labels import LabelFiles
from .plan import differences
from .shards import COMPLETE, PLAN

__all__ = ["EPISODES", "check_disk", "label_episodes", "open_work"]

logger = logging.getLogger(__name__)

EPISODES = "episodes"


def open_work(work: Path, plan: Mapping[str, Any]) -> None:
    """Begin a work folder, or go on with the one that an earlier run left.

    Raises:
        LaraArgumentError: the earlier run had other settings.
    """
    (work / EPISODES).mkdir(parents=True, exist_ok=True)
    (work / COMPLETE).unlink(missing_ok=True)
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
    write_json(work / PLAN, plan)


def check_disk(work: Path, labels: int, copied: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        work: the work folder.
        labels: bytes of the labels that are kept per episode, and then written.
        copied: bytes of files that are copied.

    Raises:
        LaraArgumentError: too little space is left.
    """
    needed, free = labels + copied, shutil.disk_usage(work).free
    if needed > free:
        raise LaraArgumentError(
            f"output: about {needed / 1e9:.1f} GB are needed, but {free / 1e9:.1f} GB are free on the disk of "
            f"{work.parent}; free some, choose another disk, or write the sidecar alone"
        )


def label_episodes(
    files: LabelFiles, dataset: Dataset, episodes: Sequence[Any], camera: str, model: LatentActionModel,
    settings: Mapping[str, Any], show: bool = True,
) -> dict[int, str]:  # fmt: skip
    """Label episodes; the damaged ones are passed over.

    Args:
        files: where the labels go.
        dataset: the source.
        episodes: of it, in ascending order.
        camera: which camera.
        model: in eval mode, on the device to run on.
        settings: gap, batch_size and dtype of :func:`encode_sequence`, and latent_dtype.
        show: a progress bar.

    Returns:
        Episodes whose frames cannot be decoded: number -> why.

    Raises:
        DatasetError: the latent of an episode is not finite.
    """
    from tqdm import tqdm

    damaged: dict[int, str] = {}
    frames = sum(episode.length for episode in episodes)
    with tqdm(total=frames, unit="frame", desc="label", disable=None if show else True) as progress:
        for episode, latents in _encode(dataset, episodes, camera, model, settings, progress):
            if isinstance(latents, DatasetError):
                damaged[episode.number] = _reason(latents)
                continue
            if not torch.isfinite(latents.latent).all():
                raise DatasetError(
                    f"episode {episode.number}: the latent holds NaN or infinite values; the model has diverged"
                )
            latent = latents.latent.flatten(1).to(getattr(torch, settings["latent_dtype"]))
            tensors = {"indices": latents.indices, "latent": latent, "valid": latents.valid}
            write_tensors(files.path(episode.number), tensors)
    return damaged


def _encode(
    dataset: Dataset, episodes: Sequence[Any], camera: str, model: LatentActionModel, settings: Mapping[str, Any],
    progress: Any,
) -> Iterator[tuple[Any, SequenceLatents | DatasetError]]:  # fmt: skip
    """Each episode with its latents, or with what is wrong with it; after an error the files are opened anew."""
    arguments = {key: settings[key] for key in ("gap", "batch_size", "dtype")}
    done = 0
    while done < len(episodes):
        try:
            for episode, frames in dataset.frames(camera, episodes[done:]):
                ahead = prefetch(frames, 2 * settings["batch_size"])
                with contextlib.closing(ahead):
                    latents = encode_sequence(model, _count_frames(ahead, progress), **arguments)
                if not len(latents.valid):
                    raise DatasetError("it has no frames")
                done += 1
                yield episode, latents
        except DatasetError as error:
            episode = episodes[done]
            done += 1
            yield episode, error


def _reason(error: DatasetError) -> str:
    """What is wrong with an episode, without its name."""
    return str(error.__cause__ if isinstance(error.__cause__, DatasetError) else error)


def _count_frames(frames: Iterator[np.ndarray], progress: Any) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame
        progress.update()
