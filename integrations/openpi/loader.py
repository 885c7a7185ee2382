"""openpi's data loader, made by openpi, whose batches carry the pair of frames for LARA."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lara_adapter import HostNotInstalled, LaraArgumentError

from ..frames import FRAMES, VALID, check_gap
from ..hosts import import_host, replaced
from .frames import FramePlan, KeepFrames
from .script import TESTED

__all__ = ["LaraDataLoader", "create_data_loader"]

logger = logging.getLogger(__name__)

BASE_IMAGE = "base_0_rgb"  # openpi's name of the main camera in the model's image dict


class LaraDataLoader:
    """Around openpi's data loader: the same batches as `(LaraObservation, actions)`.

    Attributes:
        loader: openpi's DataLoaderImpl; other attributes are looked up there.
        plan: the frames, with views and gap resolved.
    """

    def __init__(self, loader: Any, plan: FramePlan) -> None:
        self.loader, self.plan = loader, plan

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        from openpi.models.model import Observation

        from .observation import LaraObservation

        for batch in self.loader._data_loader:
            stock = Observation.from_dict({key: value for key, value in batch.items() if key not in (FRAMES, VALID)})
            yield LaraObservation.around(stock, batch[FRAMES], batch[VALID]), batch["actions"]

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.loader, name)


def create_data_loader(config: Any, plan: FramePlan | None = None, *, shuffle: bool = True, **kwargs: Any) -> Any:
    """openpi's `create_data_loader(config, framework="pytorch")`, whose observations carry frames for LARA.

    Args:
        config: openpi's TrainConfig, on a LeRobot dataset.
        plan: None: the main camera, C = the action chunk, 224 pixels.
        shuffle: as openpi's.
        **kwargs: openpi's others, such as `num_batches` and `skip_norm_stats`.

    Returns:
        A :class:`LaraDataLoader`.

    Raises:
        LaraArgumentError: a camera that does not exist or must be chosen, no episode longer than C, or a data set that
            is not LeRobot's ("fake", RLDS).
        HostNotInstalled: openpi cannot be imported, or its data loader is not the one this was written for.
    """
    module = import_host("openpi.training.data_loader")
    build = _Build(module, plan or FramePlan())
    with replaced(module, create_torch_dataset=build.create_torch_dataset, transform_dataset=build.transform):
        loader = module.create_data_loader(config, framework="pytorch", shuffle=shuffle, **kwargs)
    if build.resolved is None:
        raise LaraArgumentError(
            "openpi made no LeRobot dataset for this config (RLDS data?), which LARA needs for frames"
        )
    plan = build.resolved
    logger.info("LARA frames: %s, t and t+%d, %d x %d", list(plan.views), plan.gap, plan.frame_size, plan.frame_size)
    return LaraDataLoader(loader, plan)


class _Build:
    """What replaces two functions of openpi's data loader module while it builds one data loader."""

    def __init__(self, module: Any, plan: FramePlan) -> None:
        self.plan = plan
        self.resolved: FramePlan | None = None
        names = ("create_torch_dataset", "transform_dataset")
        missing = [name for name in names if not callable(getattr(module, name, None))]
        if missing:
            raise HostNotInstalled(f"this openpi has no {missing} in openpi/training/data_loader.py; {TESTED}")
        self.stock = {name: getattr(module, name) for name in names}

    def create_torch_dataset(self, data_config: Any, action_horizon: int, *args: Any, **kwargs: Any) -> Any:
        dataset = self.stock["create_torch_dataset"](data_config, action_horizon, *args, **kwargs)
        lerobot = _innermost(dataset)
        gap = self.plan.gap or int(action_horizon)
        inputs = (*data_config.repack_transforms.inputs, *data_config.data_transforms.inputs)
        views = _choose_views(self.plan.views, lerobot.meta, dataset, inputs)
        index = lerobot.episode_data_index
        check_gap("create_data_loader", gap, int((index["to"] - index["from"]).max()))
        for camera in views:
            # as LeRobot itself sets them from delta_timestamps=, which openpi has no argument for
            lerobot.delta_indices[camera] = [0, gap]
            lerobot.delta_timestamps[camera] = [0.0, gap / lerobot.fps]
        self.resolved = dataclasses.replace(self.plan, views=views, gap=gap)
        return dataset

    def transform(self, dataset: Any, data_config: Any, **kwargs: Any) -> Any:
        assert self.resolved is not None
        inputs = (*data_config.repack_transforms.inputs, *data_config.data_transforms.inputs)
        keep = KeepFrames(tuple(self.resolved.views), self.resolved.frame_size, inputs)
        changed = dataclasses.replace(
            data_config,
            repack_transforms=dataclasses.replace(data_config.repack_transforms, inputs=[keep]),
            data_transforms=dataclasses.replace(data_config.data_transforms, inputs=[]),
        )
        return self.stock["transform_dataset"](dataset, changed, **kwargs)


def _innermost(dataset: Any) -> Any:
    """The LeRobotDataset inside openpi's TransformedDatasets."""
    while hasattr(dataset, "_dataset"):
        dataset = dataset._dataset
    if not hasattr(dataset, "meta"):
        raise LaraArgumentError(
            f"this config's data is a {type(dataset).__name__}, but a LeRobot dataset is expected: choose a config with "
            "one (not debug, not RLDS)"
        )
    if not isinstance(getattr(dataset, "delta_indices", None), dict) or not hasattr(dataset, "episode_data_index"):
        raise HostNotInstalled(f"this version of LeRobot keeps its delta timestamps elsewhere; {TESTED}")
    return dataset


def _choose_views(views: Sequence[str], meta: Any, dataset: Any, inputs: Sequence[Any]) -> tuple[str, ...]:
    known = list(meta.camera_keys)
    if views:
        missing = [name for name in views if name not in known]
        if missing:
            raise LaraArgumentError(f"views {missing} are not in the dataset, which has {known} (--lara.views)")
        return tuple(views)
    if len(known) == 1:
        return tuple(known)
    feeding = _feeding_base_image(known, dataset, inputs)
    if len(feeding) != 1:
        raise LaraArgumentError(f"the dataset has the cameras {known}; choose with --lara.views")
    return tuple(feeding)


def _feeding_base_image(known: Sequence[str], dataset: Any, inputs: Sequence[Any]) -> list[str]:
    """The cameras that the model's main image depends on, found by inverting each in turn: the mapping is code (a
    policy's Inputs class)."""

    def base_image(item: dict[str, Any]) -> Any:
        for transform in inputs:
            item = transform(item)
        return np.asarray(item.get("image", {}).get(BASE_IMAGE))

    def inverted(image: torch.Tensor) -> torch.Tensor:
        return 1 - image if image.is_floating_point() else 255 - image

    item = dataset[0]
    plain = base_image(dict(item))
    changed = {camera: base_image({**item, camera: inverted(item[camera])}) for camera in known}
    return [camera for camera in known if not np.array_equal(changed[camera], plain)]
