"""Ridge regressions whose penalties are chosen by cross-validation over episodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["choose_ridge", "fold_rows", "predict_held_out", "ridge"]

_PENALTIES = [10.0**power for power in range(-3, 6)]
_INNER = 3  # folds in which a penalty is chosen
_WEIGHTS = (0.1, 1.0, 10.0)  # of a block's columns; a tenth is a hundred times the penalty


def fold_rows(episode: Tensor, folds: int) -> Iterator[Tensor]:
    """Masks [R] of the rows held out in each fold; rows of one episode are never on both sides."""
    names = episode.unique()
    for fold in range(min(folds, len(names))):
        yield torch.isin(episode, names[fold :: min(folds, len(names))])


def ridge(
    x: Tensor, y: Tensor, new: Tensor, penalties: Sequence[float], weights: Sequence[Tensor | None] = (None,)
) -> Iterator[list[Tensor]]:
    """Predictions at `new` of ridge regressions on standardised columns.

    Args:
        x: [R, W] double.
        y: [R, A] double.
        new: [S, W] double.
        penalties: each > 0.
        weights: [W] each, of the standardised columns; 0 leaves one out. None: 1.

    Yields:
        For each weight the predictions [S, A] of all penalties.
    """
    mean, scale, middle = x.mean(0), x.std(0), y.mean(0)
    # a column that is constant where it is fitted says nothing where it is not
    factor = torch.where(scale > 1e-6, 1 / scale.clamp_min(1e-6), 0.0)
    x, new = (x - mean) * factor, (new - mean) * factor
    few = len(x) < x.shape[1]
    gram, moved = (x, y - middle) if few else (x.T @ x, x.T @ (y - middle))
    for weight in weights:
        one = x.new_ones(x.shape[1]) if weight is None else weight
        used = one > 0
        one = one[used]
        if few:
            left, values, right = torch.linalg.svd(gram[:, used] * one, full_matrices=False)
            squares, back, target = values.square(), right.T, values[:, None] * (left.T @ moved)
        else:
            squares, back = torch.linalg.eigh(gram[used][:, used] * one * one[:, None])
            squares, target = squares.clamp_min(0), back.T @ (moved[used] * one[:, None])
        turned = (new[:, used] * one) @ back
        yield [turned @ (target / (squares + penalty)[:, None]) + middle for penalty in penalties]


def choose_ridge(
    x: Tensor, y: Tensor, episode: Tensor, folds: int, weights: Sequence[Tensor | None] = (None,)
) -> tuple[float, Tensor | None]:
    """The penalty and the weight of columns (see :func:`ridge`) with the smallest error on episodes left out."""
    losses = torch.zeros(len(weights), len(_PENALTIES), dtype=torch.double)
    for test in fold_rows(episode, folds):
        for place, predictions in enumerate(ridge(x[~test], y[~test], x[test], _PENALTIES, weights)):
            losses[place] += torch.stack([(prediction - y[test]).square().sum() for prediction in predictions])
    best = int(losses.argmin())
    return _PENALTIES[best % len(_PENALTIES)], weights[best // len(_PENALTIES)]


def predict_held_out(blocks: Sequence[Tensor], y: Tensor, episode: Tensor, folds: int) -> Tensor:
    """Predict each row by a regression on the other episodes.

    Within these, the penalty and how much each block counts are chosen, one block after the other; a later block may get
    weight 0, so that one that says nothing does no harm.

    Args:
        blocks: [R, W] double each, from what comes first to what is added to it.
        y: [R, A] double.
        episode: [R] int.
        folds: at most; at least 2 episodes in all but one of them.

    Returns:
        [R, A] double.
    """
    x, result = torch.cat(list(blocks), 1), torch.empty_like(y)
    ends = torch.tensor([block.shape[1] for block in blocks]).cumsum(0).tolist()
    for test in fold_rows(episode, folds):
        rows = ~test
        weight = torch.ones(ends[0], dtype=torch.double)
        penalty, _ = choose_ridge(x[rows, : ends[0]], y[rows], episode[rows], _INNER)
        for start, end in pairwise(ends):
            added = [weight.new_full((end - start,), each) for each in (0.0, *_WEIGHTS)]
            options = [torch.cat([weight, each]) for each in added]
            penalty, best = choose_ridge(x[rows, :end], y[rows], episode[rows], _INNER, options)
            assert best is not None
            weight = best
        ((result[test],),) = ridge(x[rows], y[rows], x[test], [penalty], [weight])
    return result
