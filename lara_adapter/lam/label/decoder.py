"""Actions from latent actions: a linear decoder fitted on demonstrations, judged on episodes left out of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.dataset import Dataset
from ...errors import DatasetError, LaraArgumentError
from ..health.ridge import choose_ridge, fold_rows, ridge
from ..model import LatentActionModel
from ..sequence import encode_sequence

__all__ = ["Decoder", "Demonstration", "encode_demonstrations", "fit_decoder"]

_FOLDS = 5
_DRAWS = 1000


class Demonstration(NamedTuple):
    """An episode whose actions are known: latent [T, W] float, valid [T] bool, actions [T, A] float."""

    latent: Tensor
    valid: Tensor
    actions: Tensor


class Decoder:
    """The action of each frame from the latent actions whose gap covers it.

    z of frames (t, t + C) gives the actions of the frames t to t + C - 1 by a ridge regression. The action of a frame is
    the mean of what the up to C valid z around it say, kept within the range of the demonstrations.

    Args:
        demonstrations: at least one.
        gap: C.
        penalty: of the ridge regression.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], gap: int, penalty: float) -> None:
        x, y, _ = _rows(demonstrations, gap)
        self.gap, self.penalty = gap, penalty
        # a linear map: what it makes of nothing and of each direction is all there is to it
        probe = torch.cat([x.new_zeros(1, x.shape[1]), torch.eye(x.shape[1], dtype=x.dtype)])
        ((made,),) = ridge(x, y, probe, [penalty])
        self.offset, self.weight = made[0], made[1:] - made[0]
        known = torch.cat([each.actions for each in demonstrations]).double()
        self.low, self.high = known.amin(0), known.amax(0)

    def decode(self, latent: Tensor, valid: Tensor) -> Tensor:
        """Actions [T, A] float32 of an episode; the last frame's action is repeated where no valid z covers a frame.

        Args:
            latent: [T, W] float.
            valid: [T] bool.
        """
        length, width = len(valid), len(self.low)
        total, count = torch.zeros(length, width, dtype=torch.double), torch.zeros(length, 1, dtype=torch.double)
        places = valid.nonzero().squeeze(1)
        chunks = (latent[places].double() @ self.weight + self.offset).unflatten(1, (self.gap, width))
        for step in range(self.gap):
            total.index_add_(0, places + step, chunks[:, step])
            count.index_add_(0, places + step, torch.ones(len(places), 1, dtype=torch.double))
        if not len(places):
            return torch.zeros(length, width)
        covered = int(places[-1]) + self.gap
        actions = (total / count.clamp_min(1))[:covered].clamp(self.low, self.high)
        return torch.cat([actions, actions[-1:].expand(length - covered, -1)]).float()


class Fitted(NamedTuple):
    """A decoder, and R^2 of the actions that decoders fitted on the other episodes give: JSON-able in `quality`."""

    decoder: Decoder
    quality: dict[str, Any]


def fit_decoder(demonstrations: Sequence[Demonstration], gap: int, least: float) -> Fitted:
    """Fit a decoder, and judge it on episodes left out of its fit.

    Args:
        demonstrations: at least three.
        gap: C.
        least: R^2 below which the decoder is refused.

    Raises:
        LaraArgumentError: too few demonstrations, actions that never change, or a decoder that is not good enough.
    """
    usable = [each for each in demonstrations if each.valid.any()]
    if len(usable) < 3:
        raise LaraArgumentError(
            f"actions: {len(usable)} demonstrations are longer than the gap of {gap} frames, but at least 3 are expected"
        )
    spread = torch.cat([each.actions for each in usable]).double().std(0)
    varies = spread > 1e-9
    if not varies.any():
        raise LaraArgumentError("actions: the actions of the demonstrations never change")
    x, y, episode = _rows(usable, gap)
    penalty, _ = choose_ridge(x, y, episode, _FOLDS)
    errors, spreads = torch.zeros(len(usable), dtype=torch.double), torch.zeros(len(usable), dtype=torch.double)
    for test in fold_rows(torch.arange(len(usable)), _FOLDS):
        fit = [usable[place] for place in (~test).nonzero().squeeze(1).tolist()]
        rows = torch.isin(episode, (~test).nonzero().squeeze(1))
        inner, _ = choose_ridge(x[rows], y[rows], episode[rows], min(3, len(fit)))
        decoder = Decoder(fit, gap, inner)
        mean = torch.cat([each.actions for each in fit]).double().mean(0)
        for place in test.nonzero().squeeze(1).tolist():
            each = usable[place]
            last = int(each.valid.nonzero()[-1]) + gap  # what is repeated after it is not decoded
            true = each.actions[:last].double()
            wrong = (decoder.decode(each.latent, each.valid)[:last] - true)[:, varies] / spread[varies]
            errors[place] = wrong.square().sum()
            spreads[place] = ((true - mean)[:, varies] / spread[varies]).square().sum()
    pick = torch.randint(len(usable), (_DRAWS, len(usable)), generator=torch.Generator().manual_seed(0))
    drawn = 1 - errors[pick].sum(1) / spreads[pick].sum(1)
    r2 = float(1 - errors.sum() / spreads.sum())
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    quality = {
        "r2": r2, "r2_interval": [low, high], "episodes": len(usable), "frames": sum(len(each.valid) for each in usable),
        "penalty": penalty,
    }  # fmt: skip
    if not r2 >= least:
        raise LaraArgumentError(
            f"actions: the decoder's R2 on demonstrations left out of its fit is {r2:.2f} ({low:.2f} to {high:.2f}), but "
            f"at least {least:g} is expected: worse labels do harm. Give more demonstrations, train the LAM on video like "
            "theirs (lara health --ceiling says what it holds of the motion), or lower least_r2"
        )
    return Fitted(Decoder(usable, gap, penalty), quality)


def encode_demonstrations(
    dataset: Dataset, camera: str, model: LatentActionModel, gap: int, batch_size: int, dtype: str
) -> list[Demonstration]:
    """The latent actions of every frame of a dataset, beside its actions; damaged episodes are left out.

    Raises:
        DatasetError: the dataset has no actions, or none that can be used.
    """
    found = []
    damaged: dict[int, str] = {}
    for episode in dataset.episodes:
        try:
            actions = dataset.actions(episode)
            if actions is None:
                raise LaraArgumentError(f"actions: {dataset.name} does not have a column 'action' of numbers")
            if not np.isfinite(actions).all():
                raise DatasetError("its actions are not finite")
            for _, frames in dataset.frames(camera, [episode]):
                made = encode_sequence(model, frames, gap, batch_size=batch_size, dtype=dtype)
        except DatasetError as error:
            damaged[episode.number] = str(error)
            continue
        found.append(Demonstration(made.latent.flatten(1), made.valid, torch.from_numpy(np.asarray(actions))))
    dataset.leave_out(damaged)
    return found


def _rows(demonstrations: Sequence[Demonstration], gap: int) -> tuple[Tensor, Tensor, Tensor]:
    """z [R, W] of all valid pairs, the actions [R, C * A] of their gaps, and the number of their episode [R]."""
    x, y, episode = [], [], []
    for number, each in enumerate(demonstrations):
        places = each.valid.nonzero().squeeze(1)
        x.append(each.latent[places].double())
        y.append(each.actions[places[:, None] + torch.arange(gap)].flatten(1).double())
        episode.append(torch.full((len(places),), number))
    return torch.cat(x), torch.cat(y), torch.cat(episode)
