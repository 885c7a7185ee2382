"""Fill the cache of a frozen image encoder's features from a dataset, so that training finds every frame in it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import open_dataset
from ..data.dataset import Dataset
from ..data.prefetch import prefetch
from ..errors import DatasetError, LaraArgumentError
from ..storage.files import check_folder
from .feature_cache import FeatureCache
from .identity import open_model
from .model import LatentActionModel
from .pixels import resize, unit
from .processes import Processes, open_processes

__all__ = ["FillReport", "fill_cache"]

logger = logging.getLogger(__name__)


class FillReport(NamedTuple):
    """What :func:`fill_cache` did, in all processes.

    folder: of the cache.
    cameras: whose frames are in it.
    episodes: that were read.
    frames: of them, in all cameras.
    encoded: of the frames, those that were not in the cache before.
    gigabytes: 10^9 bytes of features that were added.
    left_out: number -> why, of damaged episodes.
    """

    folder: str
    cameras: list[str]
    episodes: int
    frames: int
    encoded: int
    gigabytes: float
    left_out: dict[int, str]


def fill_cache(
    dataset: str | os.PathLike[str],
    lam: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    cameras: Sequence[str] = (),
    frame_size: int | None = None,
    recorded: bool = False,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
    batch_size: int = 64,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_gb: float | None = None,
    picture_fps: float | None = None,
    revision: str | None = None,
    dataset_revision: str | None = None,
) -> FillReport:
    """Encode the frames of a dataset into the folder that training names as `feature_cache`.

    A frame is found again by its exact pixels. So it has to reach the model here as it does in training: resized in the
    same way, and decoded by a decoder that gives the same pixels. Training logs its share of hits. What is in the folder
    already is not encoded again: call it again after a kill. Under `accelerate launch` the processes share the episodes.

    Args:
        dataset: folder, file or Hub id of a dataset, or a folder of videos.
        lam: folder or Hub id of a latent action model with a frozen image encoder.
        output: folder of the cache, created if needed.
        cameras: cameras to read; none: all.
        frame_size: side in pixels to which training resizes the frames before the model sees them, as its `frame_size`;
            None: the model's image size.
        recorded: training passes the frames on as recorded, and the model itself resizes them.
        episodes: numbers of the episodes to read, as "7" or "0:50"; none: all.
        skip: numbers of those to leave out.
        batch_size: frames encoded at once.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: precision of training: float32, or bfloat16 for bfloat16 autocast, which has features of its own, of half
            the size.
        max_gb: each process adds at most so many 10^9 bytes; None: no bound.
        picture_fps: frames per second of pictures; None: what the format states.
        revision: commit, tag or branch of the model on the Hub.
        dataset_revision: commit, tag or branch of the dataset on the Hub.

    Raises:
        DatasetError: there is nothing that can be read, or every episode is damaged.
        AdapterFormatError: the model, or a feature in the folder, is damaged.
        LaraArgumentError: no such camera, episode or device, a number out of range, or a model that cannot be cached: its
            image encoder trains, or it encodes difference images, which depend on the frame gap.
    """
    if batch_size < 1 or (frame_size is not None and frame_size < 1):
        raise LaraArgumentError(f"batch_size={batch_size}, frame_size={frame_size}, but at least 1 is expected")
    if recorded and frame_size is not None:
        raise LaraArgumentError(f"recorded and frame_size={frame_size}: only one of them can hold")
    if dtype not in ("float32", "bfloat16"):
        raise LaraArgumentError(f"dtype={dtype!r}, but float32 or bfloat16 is expected")
    check_folder("output", Path(output))
    with open_processes(device) as processes:
        source = processes.each(
            lambda: open_dataset(
                dataset, revision=dataset_revision, picture_fps=picture_fps, episodes=episodes, skip=skip
            )
        )
        views = source.select_cameras(cameras)
        model = processes.each(lambda: _open(lam, revision))
        cache = model.cache_features(output, max_gb=max_gb)
        assert cache is not None
        model.to(processes.device)
        size = None if recorded else frame_size or model.config.image_size
        mine = list(source.episodes)[processes.index :: processes.count]

        def fill() -> tuple[int, int, dict[int, str]]:
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                return _fill(model, cache, source, views, mine, size, batch_size, processes)

        parts = processes.gather((*processes.each(fill), cache.misses, cache.bytes_written))
    left_out = {number: why for part in parts for number, why in part[2].items()}
    if len(left_out) == len(source.episodes):
        raise DatasetError(f"{source.name}: every episode is damaged: {next(iter(left_out.values()))}")
    for number, why in sorted(left_out.items()):
        logger.warning("%s: episode %d is damaged and left out: %s", source.name, number, why)
    return FillReport(
        str(output), list(views), sum(part[0] for part in parts), sum(part[1] for part in parts),
        sum(part[3] for part in parts), sum(part[4] for part in parts) / 1e9, left_out,
    )  # fmt: skip


def _open(lam: str | os.PathLike[str], revision: str | None) -> LatentActionModel:
    model = open_model(lam, revision)[0]
    if model.config.image_encoder is None:
        raise LaraArgumentError(
            f"{Path(lam).name} has no frozen image encoder (image_encoder=None, as of --preset tiny), and the features of "
            "one that trains change with every step; only a LAM with one, as of --preset paper, can be cached"
        )
    if model.config.difference_input:
        raise LaraArgumentError(
            f"{Path(lam).name} encodes difference images too (difference_input), which depend on the frame gap: they are "
            "cached while it trains"
        )
    return model


@torch.no_grad()
def _fill(
    model: LatentActionModel, cache: FeatureCache, source: Dataset, cameras: Sequence[str], episodes: Sequence[Any],
    size: int | None, batch_size: int, processes: Processes,
) -> tuple[int, int, dict[int, str]]:  # fmt: skip
    """Episodes and frames that were read, and what is wrong with the others."""
    from tqdm import tqdm

    damaged: dict[int, str] = {}
    frames = 0
    total = len(cameras) * sum(episode.length for episode in episodes)
    with tqdm(total=total, unit="frame", desc="cache", disable=None if processes.index == 0 else True) as progress:
        for episode, camera in itertools.product(episodes, cameras):
            if episode.number in damaged:
                continue
            try:
                for batch in _batches(source, camera, episode, size, batch_size):
                    images = resize(unit(batch.to(processes.device)), model.config.image_size)
                    model.image_encoder(images)
                    frames += len(batch)
                    progress.update(len(batch))
                    progress.set_postfix(encoded=cache.misses, GB=f"{cache.bytes_written / 1e9:.1f}", refresh=False)
            except DatasetError as error:
                damaged[episode.number] = str(error.__cause__ if isinstance(error.__cause__, DatasetError) else error)
    return len(episodes) - len(damaged), frames, damaged


def _batches(source: Dataset, camera: str, episode: Any, size: int | None, batch_size: int) -> Iterator[Tensor]:
    """The frames of an episode as a data loader hands them out: [b, 3, H, W] uint8."""
    for _, frames in source.frames(camera, [episode]):
        with contextlib.closing(prefetch(frames, 2 * batch_size)) as ahead:
            while batch := list(itertools.islice(ahead, batch_size)):
                images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
                yield images if size is None else resize(images, size)
