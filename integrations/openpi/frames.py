"""Present and future frames for the latent action model, from openpi's own data pipeline, out of the model's sight.

openpi asks LeRobot for a sequence of actions and never of images, and its transforms build the model's image dict from
fixed keys. So the cameras get delta timestamps (0, C) after LeRobot's dataset has been made, and one transform around
openpi's takes the future frame out, passes on a stock item, and adds the pair to the result. The model's inputs are
bit-identical to stock openpi's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lara_adapter import FrameError, FramePair, LaraArgumentError
from lara_adapter.lam.pixels import resize

from ..frames import FRAMES, VALID, check_positive, to_uint8
from ..old_names import accept_old_names

__all__ = ["FramePlan", "KeepFrames", "observation_frames"]


@accept_old_names("cameras", "horizon", "size")
@dataclass(frozen=True)
class FramePlan:
    """Which frames LARA gets.

    Attributes:
        views: keys of the dataset's cameras; empty: the one that becomes `base_0_rgb`.
        gap: C, steps from the present to the future frame; None: the length of the model's action chunk.
        frame_size: side in pixels of the square frames; the aspect ratio is not kept.

    Raises:
        LaraArgumentError: a value outside the above.
    """

    views: Sequence[str] = ()
    gap: int | None = None
    frame_size: int = 224

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", (self.views,) if isinstance(self.views, str) else tuple(self.views))
        check_positive("FramePlan", gap=1 if self.gap is None else self.gap, frame_size=self.frame_size)
        if len(set(self.views)) < len(self.views):
            raise LaraArgumentError(f"FramePlan: views={list(self.views)}, but different ones are expected")


@dataclass(frozen=True)
class KeepFrames:
    """An openpi transform around others: they see a stock item, and the pair is added to their result.

    Attributes:
        views: keys whose value in the item is [2, 3, H, W] (now, C steps later), with flags `<key>_is_pad` [2].
        frame_size: side in pixels of the square frames.
        inputs: openpi's repack and data transforms.
    """

    views: tuple[str, ...]
    frame_size: int
    inputs: tuple[Any, ...]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Transform one item of a LeRobotDataset; its images are float in [0, 1] or uint8.

        Returns:
            What the inner transforms return, with `lara_frames` (uint8 [2, 3, S, S], or [V, 2, 3, S, S] of V cameras)
            and `lara_frames_valid` (bool: False where C steps later is past the end of the episode).

        Raises:
            FrameError: a camera whose images are not RGB.
        """
        stock, pairs, valid = dict(item), [], True
        for camera in self.views:
            pair = torch.as_tensor(stock[camera])
            if pair.ndim != 4 or tuple(pair.shape[:2]) != (2, 3):
                raise FrameError(f"{camera} has shape {list(pair.shape)}, but [2, 3, H, W] (now, later) is expected")
            pairs.append(resize(to_uint8(pair), self.frame_size))
            stock[camera] = pair[0]
            valid = valid and not bool(stock.pop(f"{camera}_is_pad")[1])
        for transform in self.inputs:
            stock = transform(stock)
        frames = torch.stack(pairs).numpy()
        return {**stock, FRAMES: frames[0] if len(frames) == 1 else frames, VALID: np.bool_(valid)}


def observation_frames(observation: Any) -> FramePair:
    """The frames of a LaraObservation: `attach_lara(policy, lam, frames=observation_frames)`.

    Raises:
        FrameError: a stock Observation, whose loader was not made by :func:`create_data_loader`.
    """
    frames = getattr(observation, FRAMES, None)
    if frames is None:
        raise FrameError(
            f"the {type(observation).__name__} carries no {FRAMES}; make the data loader with "
            "lara_adapter.integrations.openpi.create_data_loader"
        )
    return FramePair.from_tensor(frames, getattr(observation, VALID), name=FRAMES)
