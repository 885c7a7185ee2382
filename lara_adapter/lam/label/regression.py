"""Regressions with a linear and a Gaussian kernel, whose width and penalty are chosen by cross-validation over episodes."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ..health.ridge import fold_rows

__all__ = ["Kernel", "Regression", "choose_kernel"]

_LANDMARKS = 512  # Nystroem's method: a regression on more rows than this is approximated from as many of them
_WIDTHS = (1.0, 4.0, 16.0)
_PENALTIES = tuple(10.0 ** (power / 2) for power in range(-8, 5))


class Kernel(NamedTuple):
    """What a regression is fitted with.

    width: of the Gaussian kernel, in median squared distances of the rows.
    penalty: of the ridge.
    """

    width: float
    penalty: float


class Regression:
    """A ridge regression with the kernel exp(-|u - v|^2 / (width m)) + <u, v> / (2 m), m the rows' median squared distance.

    A linear map can only add up what z says of where the hand is and of how it moves; the Gaussian has them act together.

    Args:
        x: [R, W] double.
        y: [R, A] double.
        kernel: width and penalty.
    """

    def __init__(self, x: Tensor, y: Tensor, kernel: Kernel) -> None:
        features = _Features(x, kernel.width)
        self._features, self._offset = features, y.mean(0)
        (self._weight,) = _solve(features(x), y - self._offset, (kernel.penalty,))

    def __call__(self, x: Tensor) -> Tensor:
        """[S, W] -> [S, A] double."""
        return torch.cat([self._features(part) @ self._weight for part in x.split(4096)]) + self._offset


def choose_kernel(x: Tensor, y: Tensor, episode: Tensor, folds: int) -> Kernel:
    """The kernel with the smallest error on episodes left out; each column of `y` counts alike."""
    y = y / y.std(0).clamp_min(1e-9)
    losses: defaultdict[Kernel, float] = defaultdict(float)
    for test in fold_rows(episode, folds):
        middle = y[~test].mean(0)
        for width in _WIDTHS:
            features = _Features(x[~test], width)
            seen = features(x[test])
            for penalty, weight in zip(_PENALTIES, _solve(features(x[~test]), y[~test] - middle, _PENALTIES)):
                losses[Kernel(width, penalty)] += float((seen @ weight + middle - y[test]).square().sum())
    return min(losses, key=losses.__getitem__)


class _Features:
    """A map [R, W] -> [R, M] whose scalar products are the kernel."""

    def __init__(self, x: Tensor, width: float) -> None:
        self.mean = x.mean(0)
        self.marks = x[torch.linspace(0, len(x) - 1, min(len(x), _LANDMARKS)).round().long()] - self.mean
        distances = torch.cdist(self.marks, self.marks).square()
        self.typical = float(distances.median().clamp_min(1e-12))
        self.width = width * self.typical
        values, vectors = torch.linalg.eigh(self._kernel(self.marks))
        kept = values > 1e-10 * values[-1]
        self.basis = vectors[:, kept] * values[kept].rsqrt()

    def _kernel(self, x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, self.marks).square() / self.width) + x @ self.marks.T / (2 * self.typical)

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernel(x - self.mean) @ self.basis


def _solve(features: Tensor, y: Tensor, penalties: tuple[float, ...]) -> list[Tensor]:
    """Weights [M, A] of the ridge regressions from `features` [R, M] to `y` [R, A]."""
    values, vectors = torch.linalg.eigh(features.T @ features)
    target = vectors.T @ (features.T @ y)
    return [vectors @ (target / (values.clamp_min(0) + penalty)[:, None]) for penalty in penalties]
