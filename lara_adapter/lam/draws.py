"""Which pairs of a batch are reconstructed: random, and a function of a number alone, so that no generator is needed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_rows"]

_BITS = 2**32


def draw_rows(size: int, share: float, draw: int | Tensor, valid: Tensor | None, device: torch.device) -> Tensor:
    """Draw rows of a batch without replacement, each valid one with the same probability.

    Their number is `share` of the batch, rounded and at least one, whatever is valid: a number that depended on `valid`
    would have to be read from the device. Where fewer are valid than are drawn, all of them are drawn, and others.

    Args:
        size: B, rows of the batch.
        share: in (0, 1].
        draw: number of the draw, as a 0-dim int64 tensor or an int; equal numbers draw equal rows.
        valid: [B] bool, or None for all.
        device: of the result.

    Returns:
        [K] int64, distinct, in no order.
    """
    draw = torch.as_tensor(draw, dtype=torch.int64).to(device)
    place = torch.arange(size, device=device)
    # bijective on 32 bits, so that no two rows tie
    order = _scatter(place ^ _scatter(draw % _BITS))
    if valid is not None:
        order = torch.where(valid, order, order + _BITS)
    return order.argsort()[: max(1, round(share * size))]


def _scatter(number: Tensor) -> Tensor:
    """A hash of integers in [0, 2^32) to the same range ("lowbias32"): one bit of the input changes half of the output's.

    Products wrap at 64 bits, and only the lower 32 are used.
    """
    number = number ^ (number >> 16)
    number = number * 0x7FEB352D % _BITS
    number = number ^ (number >> 15)
    number = number * 0x846CA68B % _BITS
    return number ^ (number >> 16)
