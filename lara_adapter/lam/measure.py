"""How well a latent action model does, and whether its latent has collapsed, measured over a set of frame pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LaraArgumentError

__all__ = ["STILL", "LatentHealth", "measure_health"]

# Mean squared error of copying the present frame below which a pair counts as still; a moving arm gives 1e-2.
STILL = 1e-4


class LatentHealth(NamedTuple):
    """Plain numbers over all valid pairs; z is the continuous latent as one vector of N * D numbers.

    pairs: how many were measured.
    reconstruction_loss: mean squared pixel error.
    copy_loss: that of the present frame taken as the prediction.
    ratio: reconstruction over copy; 1 or more: nothing was learnt. NaN if no pixel moves in any pair.
    codes_used: codes chosen at least once.
    perplexity: exp of the entropy of the codes' shares; at most the codebook's size.
    latent_std: standard deviation over pairs, mean over the numbers of z; 0: z is constant.
    mean_direction: |E[z / |z|]|^2 in [0, 1]; near 1: z always points the same way, whatever happens.
    """

    pairs: int
    reconstruction_loss: float
    copy_loss: float
    ratio: float
    codes_used: int
    perplexity: float
    latent_std: float
    mean_direction: float


@torch.no_grad()
def measure_health(model: Any, pairs: Iterable[Sequence[Tensor]]) -> LatentHealth:
    """Measure a model in eval mode, and leave it as it was.

    Args:
        model: a :class:`LatentActionModel`; frames are moved to where its parameters are.
        pairs: batches (frame_t, frame_future) or (frame_t, frame_future, valid) as for the model's forward.

    Raises:
        LaraArgumentError: no valid pair among them.
        FrameError: frames of a wrong dtype or shape.
    """
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    number, width = 0, model.latent_width
    errors = torch.zeros(2, dtype=torch.float64)
    total, squares, directions = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
    counts = torch.zeros(int(model.quantizer.codebook_size), dtype=torch.int64)
    try:
        for batch in pairs:
            present, future = batch[0].to(device), batch[1].to(device)
            if len(batch) > 2 and batch[2] is not None:
                keep = batch[2].to(device)
                present, future = present[keep], future[keep]
            if not present.shape[0]:
                continue
            output = model(present, future)
            size = present.shape[0]
            number += size
            errors += size * torch.stack([output.reconstruction_loss, output.copy_loss]).double().cpu()
            z = output.latent.continuous.flatten(1).double().cpu()
            total += z.sum(0)
            squares += z.square().sum(0)
            directions += (z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)).sum(0)
            counts += torch.bincount(output.latent.indices.flatten().cpu(), minlength=len(counts))
    finally:
        for module, training in modes.items():
            module.training = training
    if not number:
        raise LaraArgumentError("health: pairs holds no valid pair of frames")
    reconstruction, copy = (errors / number).tolist()
    share = counts / counts.sum()
    variance = (squares / number - (total / number).square()).clamp(min=0)
    return LatentHealth(
        pairs=number, reconstruction_loss=reconstruction, copy_loss=copy,
        ratio=reconstruction / copy if copy > 0 else math.nan, codes_used=int((counts > 0).sum()),
        perplexity=float(torch.exp(-torch.xlogy(share, share).sum())), latent_std=float(variance.sqrt().mean()),
        mean_direction=float((directions / number).square().sum()),
    )  # fmt: skip
