"""A linear probe: how much of an action can be read off a latent action, on episodes the probe has not seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import LaraArgumentError

__all__ = ["ProbeResult", "cross_validated_r2"]

_PENALTIES = [10.0**power for power in range(-3, 6)]


class ProbeResult(NamedTuple):
    """How well a ridge regression predicts held-out episodes.

    r2: 1 - squared error / squared deviation from the mean of the episodes fitted on, summed over all targets, each
        scaled to unit variance. 1: all; 0: nothing; below 0: worse than the mean.
    rows: pairs.
    episodes: of which they are.
    folds: each held out once.
    """

    r2: float
    rows: int
    episodes: int
    folds: int


def cross_validated_r2(latent: Tensor, target: Tensor, episode: Tensor, *, folds: int = 5) -> ProbeResult:
    """R^2 of a ridge regression, cross-validated over episodes; the penalty is chosen within the fitted ones likewise.

    Args:
        latent: [R, W] float.
        target: [R, A] float.
        episode: [R] int; rows of one episode are never on both sides.
        folds: at most.

    Raises:
        LaraArgumentError: fewer than three episodes, or a target that never changes.
    """
    names = episode.unique()
    if len(names) < 3:
        raise LaraArgumentError(f"the probe needs pairs of at least 3 episodes, but there are {len(names)}")
    x, y = latent.double(), target.double()
    varies = y.std(0) > 1e-9
    if not varies.any():
        raise LaraArgumentError("the actions never change")
    y = y[:, varies] / y[:, varies].std(0)
    count = min(folds, len(names))
    error = deviation = 0.0
    for fold in range(count):
        test = torch.isin(episode, names[fold::count])
        fit_x, fit_y, fit_episode = x[~test], y[~test], episode[~test]
        penalty = _choose(fit_x, fit_y, fit_episode, folds)
        (prediction,) = _ridge(fit_x, fit_y, x[test], [penalty])
        error += float((prediction - y[test]).square().sum())
        deviation += float((fit_y.mean(0) - y[test]).square().sum())
    return ProbeResult(1 - error / deviation, len(x), len(names), count)


def _choose(x: Tensor, y: Tensor, episode: Tensor, folds: int) -> float:
    names = episode.unique()
    count = min(folds, len(names))
    losses = torch.zeros(len(_PENALTIES), dtype=torch.double)
    for fold in range(count):
        test = torch.isin(episode, names[fold::count])
        predictions = _ridge(x[~test], y[~test], x[test], _PENALTIES)
        losses += torch.stack([(prediction - y[test]).square().sum() for prediction in predictions])
    return _PENALTIES[int(losses.argmin())]


def _ridge(x: Tensor, y: Tensor, new: Tensor, penalties: list[float]) -> list[Tensor]:
    """Predictions at `new` of a ridge regression on standardised x, one for each penalty."""
    mean, scale, middle = x.mean(0), x.std(0).clamp_min(1e-6), y.mean(0)
    x, new = (x - mean) / scale, (new - mean) / scale
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    moved = left.T @ (y - middle)
    return [new @ (right.T @ (moved * (values / (values.square() + p))[:, None])) + middle for p in penalties]
