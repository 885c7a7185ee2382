"""How much of a motion can be seen at all: kernel regressions fitted with the labels on the pixels of the pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, pad

from ...errors import LaraArgumentError
from .ridge import fold_rows

__all__ = ["fit_kernels"]

_SIDE = 64  # pixels a side at most, before edges are found
_COMPONENTS = 192  # of each view: what is left after that is noise more than motion
_TUNED_ON = 1000  # rows at most
_WIDTHS = (0.5, 1.0, 2.0)  # of the kernel, in median squared distances of frames
_PENALTIES = (0.01, 0.1, 1.0)


def fit_kernels(
    now: Tensor,
    later: Tensor,
    labels: Tensor,
    episode: Tensor,
    *,
    states: Tensor | None = None,
    folds: int = 5,
    most: int = 3000,
) -> Tensor:
    """Fit kernel regressions from pairs of frames to labels, and predict each fold by those that have not seen it.

    Each frame is seen in three ways: colours at 8x8, hues at 16x16, edges at 16x16. For each, one regression has the kernel
    <phi(later) - phi(now), phi(later)' - phi(now)'> + k(now, now') k(later, later') with a Gaussian k: what moved, and
    what moved where. With `states`, another reads the state from a single frame, and predicts its change. What they say
    together, :func:`~lara_adapter.lam.health.motion.measure_motion` judges: a lower bound of what can be seen, found in a
    second for a few hundred pairs, in a minute for thousands. Networks see more where pairs are many:
    :func:`~lara_adapter.lam.health.ceiling.train_ceiling`.

    Args:
        now: [R, 3, H, W] uint8.
        later: the same, C frames later.
        labels: [R, L] float, without NaN: displacement, actions.
        episode: [R] int; rows of one episode are never on both sides of a split.
        states: [R, S] float, without NaN: the state at t. None: not known.
        folds: at most.
        most: rows that are fitted in a fold, evenly taken; memory grows with its square.

    Returns:
        [R, 3 (L + S)] double, columns that vary.

    Raises:
        LaraArgumentError: fewer than three episodes, or labels that never change.
    """
    if len(episode.unique()) < 3:
        raise LaraArgumentError(f"pairs of at least 3 episodes are needed, but there are {len(episode.unique())}")
    y = _standardised(labels)
    if not y.shape[1]:
        raise LaraArgumentError("the labels never change")
    place = None if states is None else _standardised(states)
    columns = []
    for seen in _views(torch.cat([now, later])):
        # one basis for all folds: it knows frames, no labels
        seen = _components(seen - seen.mean(0))
        first, second = seen.chunk(2)
        outputs = torch.empty(len(y), y.shape[1] + (0 if place is None else place.shape[1]), dtype=torch.double)
        kernel: _Kernel | None = None
        for test in fold_rows(episode, folds):
            rows = _at_most((~test).nonzero().squeeze(1), most)
            if kernel is None:  # one for all folds
                kernel = _tuned(first, second, y, rows, episode)
            outputs[test] = kernel.predict(first, second, y, place, rows, test.nonzero().squeeze(1))
        columns.append(outputs)
    return torch.cat(columns, 1)


class _Kernel(NamedTuple):
    """A Gaussian kernel of frames, and the penalty of the regressions that use it."""

    width: float
    penalty: float

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """[P, K], [Q, K] -> [P, Q] double."""
        return torch.exp(-torch.cdist(one, other).square().double() / self.width)

    def of_pairs(self, now: Tensor, later: Tensor, fitted: tuple[Tensor, Tensor]) -> Tensor:
        same = self(now, fitted[0]), self(later, fitted[1])
        return same[0] + same[1] - self(now, fitted[1]) - self(later, fitted[0]) + same[0] * same[1]

    def predict(
        self, first: Tensor, second: Tensor, y: Tensor, place: Tensor | None, rows: Tensor, new: Tensor
    ) -> Tensor:
        """Labels, then the change of the state, of the pairs `new` by regressions on the pairs `rows`."""
        fitted, ridge = (first[rows], second[rows]), self.penalty * torch.eye(len(rows), dtype=torch.double)
        middle = y[rows].mean(0)
        weights = torch.linalg.solve(self.of_pairs(*fitted, fitted) + ridge, y[rows] - middle)
        if place is not None:
            of_place = torch.linalg.solve(self(fitted[0], fitted[0]) + ridge, place[rows] - place[rows].mean(0))
        parts = []
        for part in new.split(1024):
            now, later = first[part], second[part]
            said = [self.of_pairs(now, later, fitted) @ weights + middle]
            if place is not None:
                said.append((self(later, fitted[0]) - self(now, fitted[0])) @ of_place)
            parts.append(torch.cat(said, 1))
        return torch.cat(parts)


def _tuned(first: Tensor, second: Tensor, y: Tensor, rows: Tensor, episode: Tensor) -> _Kernel:
    """The kernel with the smallest error on a fifth of the episodes of `rows`."""
    names = episode[rows].unique()
    checked = torch.isin(episode[rows], names[:: min(5, len(names))])
    fit, held_out = _at_most(rows[~checked], _TUNED_ON), _at_most(rows[checked], _TUNED_ON)
    typical = float(torch.cdist(first[fit], first[fit]).square().median().clamp_min(1e-12))
    options = [_Kernel(width * typical, penalty) for width in _WIDTHS for penalty in _PENALTIES]
    errors = [(each.predict(first, second, y, None, fit, held_out) - y[held_out]).square().sum() for each in options]
    return options[int(torch.stack(errors).argmin())]


def _standardised(values: Tensor) -> Tensor:
    """Columns that vary, double, with mean 0 and deviation 1."""
    values = values.detach().cpu().double()
    mean, deviation = values.mean(0), values.std(0)
    varies = deviation > 1e-9
    return ((values - mean) / deviation)[:, varies]


def _at_most(rows: Tensor, most: int) -> Tensor:
    """Evenly taken."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


def _components(seen: Tensor) -> Tensor:
    """Principal components: [N, W] -> [N, at most 192]."""
    some = seen[_at_most(torch.arange(len(seen)), 4000)].double()
    _, vectors = torch.linalg.eigh(some.T @ some)  # in float32 it fails where most pixels never change
    return seen @ vectors[:, -_COMPONENTS:].float()


def _views(frames: Tensor) -> list[Tensor]:
    """Each frame in three ways: [N, W] each."""
    parts = [
        [view(small).flatten(1) for view in (_colours, _hues, _edges)] for small in map(_smaller, frames.split(256))
    ]
    return [torch.cat(list(seen)) for seen in zip(*parts)]


def _smaller(frames: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> float in [0, 1], sides of 64 pixels at most."""
    return _pooled(frames.float() / 255, _SIDE)


def _colours(frames: Tensor) -> Tensor:
    return _pooled(frames, 8)


def _hues(frames: Tensor) -> Tensor:
    """Colours without brightness."""
    return _pooled(frames / (frames.sum(1, keepdim=True) + 0.1), 16)


def _edges(frames: Tensor) -> Tensor:
    grey = frames.mean(1, keepdim=True)
    return _pooled((grey - avg_pool2d(pad(grey, (3, 3, 3, 3), mode="replicate"), 7, 1)).abs(), 16)


def _pooled(frames: Tensor, side: int) -> Tensor:
    """Sides of `side` pixels, or as they are where they are shorter."""
    height, width = frames.shape[-2:]
    return adaptive_avg_pool2d(frames, (min(side, height), min(side, width)))
