"""A linear probe: how much of an action can be read off a latent action, on episodes the probe has not seen."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...errors import LaraArgumentError
from .ridge import choose_ridge, fold_rows, ridge

__all__ = ["ProbeResult", "cross_validated_r2"]


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
    error = deviation = 0.0
    for test in fold_rows(episode, folds):
        fit_x, fit_y = x[~test], y[~test]
        penalty, _ = choose_ridge(fit_x, fit_y, episode[~test], folds)
        ((prediction,),) = ridge(fit_x, fit_y, x[test], [penalty])
        error += float((prediction - y[test]).square().sum())
        deviation += float((fit_y.mean(0) - y[test]).square().sum())
    return ProbeResult(1 - error / deviation, len(x), len(names), min(folds, len(names)))
