"""What the frames of all hosts have in common: pairs (now, `gap` steps later) of uint8 images."""

from __future__ import annotations

from typing import Any

import torch

from lara_adapter import LaraArgumentError
from lara_adapter.config import DEFAULT_FRAMES

__all__ = ["FRAMES", "VALID", "check_gap", "check_positive", "to_uint8"]

FRAMES = DEFAULT_FRAMES  # key of a sample and of a batch
VALID = f"{FRAMES}_valid"


def check_positive(caller: str, **values: Any) -> None:
    """Raise LaraArgumentError if a value is not an integer >= 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LaraArgumentError(f"{caller}: {name}={value!r}, but an integer >= 1 is expected")


def check_gap(caller: str, gap: int, longest: int, dataset: str = "the dataset") -> None:
    """Raise LaraArgumentError if `longest`, the steps of the longest episode, is not above `gap`."""
    if longest <= gap:
        raise LaraArgumentError(
            f"{caller}: gap={gap} steps, but the longest episode of {dataset} has {longest}: no pair would be valid "
            "(--lara.gap)"
        )


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in uint8; float ones are in [0, 1]."""
    return frames if frames.dtype == torch.uint8 else frames.mul(255).round_().clamp_(0, 255).to(torch.uint8)
