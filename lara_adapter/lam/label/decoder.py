"""Actions from latent actions: a decoder fitted on demonstrations, judged on episodes left out of the fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...data.dataset import Dataset
from ...errors import DatasetError, LaraArgumentError
from ..health.ridge import fold_rows
from ..model import LatentActionModel
from ..sequence import encode_sequence
from .regression import Kernel, Regression, choose_kernel

__all__ = ["LEAST_R2", "Decoder", "Demonstration", "encode_demonstrations", "fit_decoder"]

LEAST_R2 = 0.5  # on demonstrations left out, below which nothing is labelled

_FOLDS = 5
_DRAWS = 1000


class Demonstration(NamedTuple):
    """An episode whose actions are known: latent [T, W] float, valid [T] bool, actions [T, A] float."""

    latent: Tensor
    valid: Tensor
    actions: Tensor


class Decoder:
    """The action of each frame from the latent actions around it.

    A regression says the actions of the frames t to t + C - 1 from the latent actions of the pairs that begin at t - C,
    t - C / 2, t, t + C / 2 and t + C: one of them says little of when within its gap the robot moved, their overlap does.
    The action of a frame is the mean of what is said of it from up to C such t, within the range of the demonstrations.

    Args:
        demonstrations: at least one.
        gap: C.
        kernel: of the regression.
    """

    def __init__(self, demonstrations: Sequence[Demonstration], gap: int, kernel: Kernel) -> None:
        x, y, _ = _rows(demonstrations, gap)
        self.gap, self.kernel = gap, kernel
        self._regression = Regression(x, y, kernel)
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
        if not len(places):
            return torch.zeros(length, width)
        chunks = self._regression(_around(latent, places, self.gap)).unflatten(1, (self.gap, width))
        for step in range(self.gap):
            total.index_add_(0, places + step, chunks[:, step])
            count.index_add_(0, places + step, torch.ones(len(places), 1, dtype=torch.double))
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
    kernel = choose_kernel(x, y, episode, _FOLDS)
    errors, spreads = torch.zeros(len(usable), dtype=torch.double), torch.zeros(len(usable), dtype=torch.double)
    for test in fold_rows(torch.arange(len(usable)), _FOLDS):
        fit = [usable[place] for place in (~test).nonzero().squeeze(1).tolist()]
        rows = torch.isin(episode, (~test).nonzero().squeeze(1))
        decoder = Decoder(fit, gap, choose_kernel(x[rows], y[rows], episode[rows], min(3, len(fit))))
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
        **kernel._asdict(),
    }  # fmt: skip
    if not r2 >= least:
        raise LaraArgumentError(
            f"actions: the decoder's R2 on demonstrations left out of its fit is {r2:.2f} ({low:.2f} to {high:.2f}), but "
            f"at least {least:g} is expected: worse labels do harm. Give more demonstrations, train the LAM on video like "
            "theirs (lara health --ceiling says what it holds of the motion), or lower least_r2"
        )
    return Fitted(Decoder(usable, gap, kernel), quality)


def encode_demonstrations(
    dataset: Dataset, camera: str, model: LatentActionModel, gap: int, batch_size: int, dtype: str
) -> list[Demonstration]:
    """The latent actions of every frame of a dataset, beside its actions; damaged episodes are left out.

    Raises:
        LaraArgumentError: the dataset has no actions.
        DatasetError: it has none that can be used.
    """
    found = []
    damaged: dict[int, str] = {}
    for episode in dataset.episodes:
        try:
            actions = dataset.known_actions(episode)
            for _, frames in dataset.frames(camera, [episode]):
                made = encode_sequence(model, frames, gap, batch_size=batch_size, dtype=dtype)
        except DatasetError as error:
            damaged[episode.number] = str(error)
            continue
        found.append(Demonstration(made.latent.flatten(1), made.valid, torch.from_numpy(np.asarray(actions))))
    dataset.leave_out(damaged)
    return found


def _rows(demonstrations: Sequence[Demonstration], gap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latent actions around all valid pairs [R, 5 W], the actions [R, C * A] of their gaps, number of their episode [R]."""
    x, y, episode = [], [], []
    for number, each in enumerate(demonstrations):
        places = each.valid.nonzero().squeeze(1)
        x.append(_around(each.latent, places, gap))
        y.append(each.actions[places[:, None] + torch.arange(gap)].flatten(1).double())
        episode.append(torch.full((len(places),), number))
    return torch.cat(x), torch.cat(y), torch.cat(episode)


def _around(latent: Tensor, places: Tensor, gap: int) -> Tensor:
    """Latent actions [P, 5 W] at each of P >= 1 places, half a gap and a gap before and after; at the ends the nearest."""
    moves = [-gap, -(gap // 2), 0, gap // 2, gap]
    near = [places[torch.searchsorted(places, places + move).clamp_max(len(places) - 1)] for move in moves]
    return torch.cat([latent[each] for each in near], 1).double()
