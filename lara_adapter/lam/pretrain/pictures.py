"""Pictures of what a latent action model predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...data.video import write_png
from ...storage.files import replace_file
from ..model import LatentActionModel
from ..pixels import prepare_pair

__all__ = ["prediction_picture", "write_predictions"]

_LINE = 2  # white pixels between pictures


@torch.no_grad()
def prediction_picture(model: LatentActionModel, present: Tensor, future: Tensor) -> np.ndarray:
    """One row per pair: I_t, I_{t+C}, the prediction of I_{t+C}, and its error times two; [height, width, 3] uint8, RGB.

    The frames are [B, 3, H, W], as for the model, which is in eval mode: the codebook's usage must not count them.
    """
    device = next(model.parameters()).device
    frames = prepare_pair(present.to(device), future.to(device), None, model.config.image_size)
    predicted = model.predict(frames[0], model.encode(*frames))
    wrong = (2 * (predicted - frames[1]).abs()).clamp(max=1)
    rows = torch.stack([*frames, predicted.float(), wrong], dim=1)  # [B, 4, 3, S, S]
    rows = torch.nn.functional.pad(rows, (0, _LINE, 0, _LINE), value=1.0)
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    picture: np.ndarray = (sheet * 255).round().to(torch.uint8).cpu().numpy()
    return picture


def write_predictions(
    model: LatentActionModel, pairs: Sequence[tuple[Tensor, Tensor]], path: Path, rows: int = 8
) -> None:
    """Write :func:`prediction_picture` of `rows` pairs as a PNG file, atomically; the model's mode does not change.

    The pairs are spread evenly over the batches (I_t, I_{t+C}).
    """
    present, future = (torch.cat([batch[side] for batch in pairs]) for side in (0, 1))
    chosen = torch.linspace(0, present.shape[0] - 1, min(rows, present.shape[0])).long()
    training = model.training
    model.eval()
    try:
        picture = prediction_picture(model, present[chosen], future[chosen])
    finally:
        model.train(training)
    with replace_file(path) as fresh:
        write_png(fresh, picture)
