"""Quantisers of other libraries in the place of ours, above all those of vector-quantize-pytorch.

Their common call is `quantized, indices, loss = quantizer(z)`. Two keywords that some of them know are used where
they exist: `mask`, so that invalid samples do not count, and `freeze_codebook`, so that a frozen model stays as it is.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..errors import LaraArgumentError
from .quantizer import QuantizerTerms

__all__ = ["lookup_codes", "quantize", "supported_keywords"]


def supported_keywords(quantizer: nn.Module) -> frozenset[str]:
    """Which of the keywords `mask` and `freeze_codebook` the quantiser's forward takes.

    Raises:
        LaraArgumentError: it has no integer `codebook_size`, without which its use cannot be measured.
    """
    if not isinstance(getattr(quantizer, "codebook_size", None), int):
        raise LaraArgumentError(f"quantizer: {type(quantizer).__name__} has no integer codebook_size")
    return frozenset({"mask", "freeze_codebook"} & inspect.signature(quantizer.forward).parameters.keys())


def quantize(
    quantizer: nn.Module, keywords: frozenset[str], z: Tensor, valid: Tensor | None, update: bool
) -> tuple[Tensor, Tensor, Tensor, QuantizerTerms]:
    """Call a foreign quantiser as if it were ours.

    Args:
        quantizer: the module.
        keywords: from :func:`supported_keywords`.
        z: [B, N, D] float32.
        valid: [B] bool; no gradient reaches the z of other samples. Their codebook statistics are only left out where
            the quantiser takes a `mask`.
        update: whether it may change its codebook.

    Returns:
        quantized [B, N, D] float32, indices [B, N] (or [B, N, quantisers]) int64, its loss summed to a scalar, terms
        with that loss as the codebook term and the usage within this batch.

    Raises:
        LaraArgumentError: it returns another shape.
    """
    arguments: dict[str, object] = {}
    if valid is not None:
        z = torch.where(valid[:, None, None], z, z.detach())
        if "mask" in keywords:
            arguments["mask"] = valid[:, None].expand(z.shape[:2])
    if "freeze_codebook" in keywords:
        arguments["freeze_codebook"] = not update
    with torch.autocast(z.device.type, enabled=False):
        result = quantizer(z, **arguments)
    quantized, indices = result[0].float(), result[1]
    if quantized.shape != z.shape or indices.shape[:2] != z.shape[:2]:
        raise LaraArgumentError(
            f"quantizer: {type(quantizer).__name__} maps {list(z.shape)} to {list(quantized.shape)} with indices "
            f"{list(indices.shape)}, but the same shape and indices {list(z.shape[:2])} are expected"
        )
    # [1] or one per stage of a residual quantiser; FSQ has none
    loss = result[2].float().sum() if len(result) > 2 else z.new_zeros(())
    size = int(quantizer.codebook_size)  # type: ignore[arg-type]  # checked in supported_keywords
    counted = torch.ones_like(indices, dtype=torch.float32)
    if valid is not None:
        counted = counted * valid.view(-1, *[1] * (indices.ndim - 1))
    counts = z.new_zeros(size).scatter_add_(0, indices.flatten().clamp(0, size - 1), counted.flatten())
    share = counts / counts.sum().clamp(min=1)
    terms = QuantizerTerms(
        loss, torch.zeros_like(loss), torch.exp(-torch.xlogy(share, share).sum()), (counts > 0).sum().float()
    )
    return quantized, indices, loss, terms


def lookup_codes(quantizer: nn.Module, indices: Tensor) -> Tensor:
    """Codes [B, N, D] of indices.

    Raises:
        LaraArgumentError: the quantiser offers no look-up under the names that vector-quantize-pytorch uses.
    """
    for name in ("get_output_from_indices", "indices_to_codes"):
        method = getattr(quantizer, name, None)
        if callable(method):
            codes: Tensor = method(indices)
            return codes
    raise LaraArgumentError(
        f"predict: {type(quantizer).__name__} cannot look up indices (no get_output_from_indices or "
        "indices_to_codes); pass a LatentAction or its quantized tokens"
    )
