"""What the frames of all hosts have in common: pairs (now, `gap` steps later) of uint8 images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lara_adapter import LaraAdapter, LaraArgumentError, LatentActionModel
from lara_adapter.config import DEFAULT_FRAMES
from lara_adapter.lam.feature_reader import FeatureReader

__all__ = ["FRAMES", "VALID", "check_gap", "check_positive", "feature_reader", "to_uint8"]

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


def feature_reader(
    lara: LaraAdapter, mixed_precision: str, collate: Callable[[Any], Any] = list
) -> FeatureReader | None:
    """What lets a data loader's workers read the features that an adapter's LAM keeps on disk; None where it keeps none.

    Args:
        lara: the adapter.
        mixed_precision: that of the run: "no", "bf16" or "fp16".
        collate: the host's collate function.
    """
    lam, key = lara.lam, lara.config.frames
    if key is None or not isinstance(lam, LatentActionModel) or getattr(lam.image_encoder, "cache", None) is None:
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    return lam.prefetch_features(collate, frames=key, dtype=dtype)


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Frames in uint8; float ones are in [0, 1]."""
    return frames if frames.dtype == torch.uint8 else frames.mul(255).round_().clamp_(0, 255).to(torch.uint8)
