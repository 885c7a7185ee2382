"""A short training loop for a latent action model (LAM), shared by the demo and lerobot_posttrain.py.

`lara train-lam` (lara_adapter.lam.pretrain) is the real one: video files, several processes, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lara_adapter import LatentActionModel
from lara_adapter.lam.pretrain.augment import augment
from lara_adapter.lam.pretrain.labelled import LabelledPairs, SupervisedLam

LOG_EVERY = 10

History = dict[str, list[float]]


def adamw_cosine(module: nn.Module, lr: float, steps: int) -> tuple[Optimizer, LambdaLR]:
    """AdamW over everything that trains; the learning rate warms up for 20 steps and falls to zero along a cosine."""
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=1e-5)
    return optimizer, LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def log(history: History, **values: float) -> None:
    """Append one point to every curve."""
    for key, value in values.items():
        history.setdefault(key, []).append(value)


def optimise_lam(
    lam: LatentActionModel,
    stream: Iterator[Mapping[str, Tensor]],
    lr: float,
    steps: int,
    progress: Callable[[int], object],
    reconstruct: float = 1.0,
    labelled: LabelledPairs | None = None,
    augmented: int | None = None,
) -> History:
    """Train a LAM by its own loss (LARA, Eq. 3), without a policy.

    Args:
        lam: the model.
        stream: at least `steps` batches with `lara_frames` [B, 2, 3, H, W] and `lara_frames_valid` [B].
        lr: peak learning rate.
        steps: how many.
        progress: called with 1 after each step.
        reconstruct: part of the pairs whose future frame is predicted, drawn at each step.
        labelled: pairs whose actions have to be read off z, as many at each step as of the stream.
        augmented: seed of the random squares and light that the inverse dynamics model sees; None: there are none.

    Returns:
        Curves: `step`, `reconstruction_over_copy`, `codes_used`.
    """
    history: History = {}
    trained = lam if labelled is None else SupervisedLam(lam, labelled.width)
    optimizer, schedule = adamw_cosine(trained, lr, steps)
    lam.train()
    for step, batch in enumerate(stream):
        pair = (*batch["lara_frames"].unbind(1), batch["lara_frames_valid"])
        options: dict[str, Any] = {"reconstruct": reconstruct, "draw": step}
        if augmented is not None:
            options["seen"] = tuple(augment(torch.cat(pair[:2]), (augmented, step)).chunk(2))
        if labelled is None:
            output = lam(*pair, **options)
            loss = output.loss
        else:
            known = labelled.draw(len(pair[0]), step, augmented=augmented is not None)
            output, error = trained(*pair, labelled=known, **options)
            loss = output.loss + error
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(1)
        if step % LOG_EVERY == 0 or step == steps - 1:
            over_copy = float(output.reconstruction_loss.detach() / output.copy_loss)
            log(history, step=step, reconstruction_over_copy=over_copy, codes_used=float(output.codes_used))
    lam.eval()
    return history
