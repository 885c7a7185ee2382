"""How well the future frame is predicted: the reconstruction terms of L_LAM (LARA, Eq. 3), over all pairs or a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Reconstruction", "reconstruct_pairs"]


class Reconstruction(NamedTuple):
    """The predicted frames, and float32 scalars.

    frames: [K, 3, S, S] float32, not clamped.
    error: mean squared pixel error over the valid ones of the K pairs.
    copy_error: that of the present frame taken as the prediction, over the valid ones of all B pairs.
    distance: mean perceptual distance; None where there is none.
    """

    frames: Tensor
    error: Tensor
    copy_error: Tensor
    distance: Tensor | None


def reconstruct_pairs(
    predict: Callable[[Tensor, Tensor], Tensor],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    frames: Tensor,
    tokens: Tensor,
    valid: Tensor | None,
    rows: Tensor | None,
) -> Reconstruction:
    """Predict the future frames and measure how far off they are.

    Args:
        predict: (frames [K, 3, S, S], tokens [K, N, D]) -> [K, 3, S, S].
        perceptual: distance per sample, [K, 3, S, S] twice -> [K].
        frames: [2, B, 3, S, S] float32, present and future.
        tokens: [B, N, D] quantised latent tokens.
        valid: [B] bool; other pairs count for nothing.
        rows: [K] int64, the pairs that are predicted; None: all.
    """
    present, future = frames
    # of all pairs: as a divisor it must not depend on the draw, or the loss would be biased
    weights = _weights(valid)
    copy_error = _mean(_pixel_errors(present, future), weights)
    if rows is not None:
        present, future, tokens = (part.index_select(0, rows) for part in (present, future, tokens))
        valid = None if valid is None else valid[rows]
        weights = _weights(valid)
    predicted = judged = predict(present, tokens)
    with torch.autocast(present.device.type, enabled=False):
        if valid is not None:
            # where and not a product with 0: it stops even an infinite gradient of what does not count
            judged = torch.where(valid[:, None, None, None], predicted, future)
        error = _mean(_pixel_errors(judged, future), weights)
    # in the precision of the host, which knows what it tolerates
    distance = None if perceptual is None else _mean(perceptual(judged, future).float(), weights)
    return Reconstruction(predicted, error, copy_error, distance)


def _pixel_errors(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each of [B, 3, S, S]."""
    return F.mse_loss(images, target, reduction="none").mean(dim=(1, 2, 3))


def _weights(valid: Tensor | None) -> Tensor | None:
    """[B] float32 that add up to 1, or to 0 where nothing is valid; None: all count alike."""
    return None if valid is None else valid.float() / valid.sum().clamp(min=1)


def _mean(per_sample: Tensor, weights: Tensor | None) -> Tensor:
    return per_sample.mean() if weights is None else torch.dot(per_sample, weights.to(per_sample.dtype))
