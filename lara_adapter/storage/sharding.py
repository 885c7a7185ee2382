"""Tensors spread over ranks: DTensor (FSDP2) and DeepSpeed's ZeRO-3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["gathered", "whole"]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, contiguous, without graph. A DTensor of FSDP2 is gathered, which is a collective."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().to("cpu").contiguous()


@contextlib.contextmanager
def gathered(module: nn.Module | Iterable[torch.Tensor]) -> Iterator[bool]:
    """A context in which parameters that ZeRO-3 has partitioned are whole on every rank; outside they are empty.

    Yields:
        Whether they are partitioned; then the context is a collective: every rank must enter it.
    """
    parameters = module.parameters() if isinstance(module, nn.Module) else module
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield True
