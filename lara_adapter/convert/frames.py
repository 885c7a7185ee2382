"""The range of the frames: the official tokenizer normalises nothing, ours takes frames in [0, 1].

LARA's first stage uses frames in [0, 1]; its joint training and Moto use ImageNet-normalised ones in encoder and decoder,
and the decoder predicts normalised pixels. Ours normalises for the encoder only (`image_mean`, `image_std`). For the
decoder the normalisation goes into its first and last linear maps, W (x - m) / s + b = (W / s) x + (b - W m / s): latent
and codes are the same, and so is the predicted frame, in [0, 1] instead of normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..lam.config import LatentActionConfig

__all__ = ["IMAGENET", "UNIT", "FrameRange", "fold", "unfold"]

Triple = tuple[float, float, float]

_EMBED = "forward_dynamics.patch_embedding"
_HEAD = "forward_dynamics.head"


class FrameRange(NamedTuple):
    """The frames of the official model: (frame in [0, 1] - mean) / std, per channel."""

    mean: Triple
    std: Triple

    @property
    def is_unit(self) -> bool:
        """Whether frames are in [0, 1]."""
        return self == UNIT


UNIT = FrameRange((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = FrameRange((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def fold(state: Mapping[str, Tensor], config: LatentActionConfig, frames: FrameRange) -> dict[str, Tensor]:
    """Rescale a state (our names) whose decoder takes and predicts `frames` to one for [0, 1]."""
    return dict(state) if frames.is_unit else _rescale(state, config, frames, into_weights=True)


def unfold(state: Mapping[str, Tensor], config: LatentActionConfig, frames: FrameRange) -> dict[str, Tensor]:
    """The inverse of :func:`fold`, up to rounding."""
    return dict(state) if frames.is_unit else _rescale(state, config, frames, into_weights=False)


def _rescale(
    state: Mapping[str, Tensor], config: LatentActionConfig, frames: FrameRange, into_weights: bool
) -> dict[str, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in frames)
    embed, embed_bias = state[f"{_EMBED}.weight"].double(), state[f"{_EMBED}.bias"].double()
    # the pixel shuffle takes the channel from the slowest of the three dimensions of the head's output
    head = state[f"{_HEAD}.weight"].double().unflatten(0, (3, -1))
    head_bias = state[f"{_HEAD}.bias"].double().unflatten(0, (3, -1))
    if into_weights:
        embed = embed / std[:, None, None]
        embed_bias = embed_bias - (embed * mean[:, None, None]).sum((1, 2, 3))
        head, head_bias = head * std[:, None, None], head_bias * std[:, None] + mean[:, None]
    else:
        embed_bias = embed_bias + (embed * mean[:, None, None]).sum((1, 2, 3))
        embed = embed * std[:, None, None]
        head, head_bias = head / std[:, None, None], (head_bias - mean[:, None]) / std[:, None]
    changed = {
        f"{_EMBED}.weight": embed,
        f"{_EMBED}.bias": embed_bias,
        f"{_HEAD}.weight": head.flatten(0, 1),
        f"{_HEAD}.bias": head_bias.flatten(0, 1),
    }
    return {**state, **{name: tensor.to(state[name].dtype) for name, tensor in changed.items()}}
