"""What the inverse dynamics model sees may be changed at random; what the forward dynamics have to predict stays.

A square or a light that is in no frame to be predicted is not worth a place in z, and so real ones get less of it too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["augment"]

_SQUARES = 2
_SIDES = 0.1, 0.3  # of the frame's
_LIGHT = 0.7, 1.3


def augment(frames: Tensor, seed: Sequence[int]) -> Tensor:
    """Frames with two squares of random place, size and colour, and in another light; each frame with its own.

    Args:
        frames: [F, 3, S, S] uint8.
        seed: numbers >= 0; equal ones change frames in equal ways.

    Returns:
        [F, 3, S, S] uint8.
    """
    count, _, _, size = frames.shape
    random = np.random.default_rng(list(seed))
    place = np.arange(size)
    result = frames
    for _ in range(_SQUARES):
        side = random.uniform(*_SIDES, count)[:, None] * size
        top, left = (random.uniform(size=(count, 1)) * (size - side) for _ in range(2))
        rows, columns = (
            torch.from_numpy((place >= start) & (place < start + side)).to(frames.device) for start in (top, left)
        )
        covered = rows[:, None, :, None] & columns[:, None, None, :]
        colour = torch.from_numpy(random.integers(256, size=(count, 3, 1, 1)).astype(np.uint8)).to(frames.device)
        result = torch.where(covered, colour, result)
    light = torch.from_numpy(random.uniform(*_LIGHT, (count, 1, 1, 1)).astype(np.float32)).to(frames.device)
    return (result * light).clamp(0, 255).to(torch.uint8)
