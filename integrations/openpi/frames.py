"""Present and future frames for the latent action model, from openpi's own data pipeline, out of the model's sight.

openpi asks LeRobot for a sequence of actions and never of images, and its transforms build the model's image dict from
fixed keys. So the cameras get delta timestamps (0, C) when LeRobot's dataset has been made, and one transform in front
of openpi's takes the future frame out again, hands openpi's transforms the item they know, and puts the pair beside
what they return. The model's inputs are bit-identical to stock openpi's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lara_adapter import FrameError, FramePair, LaraArgumentError

__all__ = ["FRAMES", "VALID", "FramePlan", "KeepFrames", "observation_frames"]

FRAMES = "lara_frames"
VALID = f"{FRAMES}_valid"


@dataclass(frozen=True)
class FramePlan:
    """Which frames LARA wants.

    Attributes:
        cameras: keys of the dataset's cameras, in the order of the views; empty: the one that becomes `base_0_rgb`.
        horizon: C, steps from the present to the future frame; None: the length of the model's action chunk.
        size: side in pixels of the square frames; the aspect ratio is not kept.

    Raises:
        LaraArgumentError: a value outside the above.
    """

    cameras: Sequence[str] = ()
    horizon: int | None = None
    size: int = 224

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", (self.cameras,) if isinstance(self.cameras, str) else tuple(self.cameras))
        for name in ("horizon", "size"):
            value = getattr(self, name)
            if value is None and name == "horizon":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LaraArgumentError(f"FramePlan: {name}={value!r}, but an integer >= 1 is expected")
        if len(set(self.cameras)) < len(self.cameras):
            raise LaraArgumentError(f"FramePlan: cameras={list(self.cameras)}, but different ones are expected")


@dataclass(frozen=True)
class KeepFrames:
    """A transform of openpi's kind: the transforms inside it see a stock item, and the pair comes out beside their result.

    Attributes:
        cameras: keys whose value in the item is [2, 3, H, W] (now, C steps later), with flags `<key>_is_pad` [2].
        size: side in pixels of the square frames.
        inputs: openpi's repack and data transforms.
    """

    cameras: tuple[str, ...]
    size: int
    inputs: tuple[Any, ...]

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Transform one item.

        Args:
            item: of a LeRobotDataset; images are float in [0, 1] or uint8.

        Returns:
            What the inner transforms return, with `lara_frames` (uint8 [2, 3, size, size], or [V, 2, 3, size, size] of
            V cameras) and `lara_frames_valid` (bool: False where C steps later is past the end of the episode).

        Raises:
            FrameError: a camera whose images are not RGB.
        """
        stock, pairs, valid = dict(item), [], True
        for camera in self.cameras:
            pair = torch.as_tensor(stock[camera])
            if pair.ndim != 4 or tuple(pair.shape[:2]) != (2, 3):
                raise FrameError(f"{camera} has shape {list(pair.shape)}, but [2, 3, H, W] (now, later) is expected")
            pairs.append(_resize(pair, self.size))
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


def _resize(pair: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [2, 3, size, size] of [2, 3, H, W] in [0, 1] or uint8."""
    if pair.is_floating_point():
        pair = pair.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    if tuple(pair.shape[-2:]) == (size, size):
        return pair
    return F.interpolate(pair, (size, size), mode="bilinear", antialias=True, align_corners=False)
