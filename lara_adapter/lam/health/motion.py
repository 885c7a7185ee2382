"""How much of a motion is in a latent action, beyond what the present frame already says; and against a ceiling.

R^2 from z to the action is not a measure of motion where actions follow from what is seen: z of two equal frames then
scores nearly as well. Here z is judged by what it adds to z of two equal frames, to the robot's state and to the task.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import LaraArgumentError
from .ridge import fold_rows, predict_held_out

__all__ = ["Estimate", "Motion", "measure_motion"]

_CROSS = 16  # numbers of state and task up to which all their products are used, not only squares


class Estimate(NamedTuple):
    """A number and its 95 % interval: a bootstrap over the measured episodes, not over trainings or seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Motion(NamedTuple):
    """What latent actions say about one target; R^2 on held-out episodes, at most 1, about 0 or below for nothing.

    pair: R^2 from z of (I_t, I_t+C).
    still: from z of (I_t, I_t), in which nothing moves.
    known: from state and task at t, with their squares and products. None: neither is known.
    present: from all that is known at t, `still` and `known`.
    beyond: partial R^2 of `pair`: the share of what `present` leaves unexplained that z of the pair explains.
    ceiling: as `pair`, for what is trained with the labels on the pixels of the pairs. None: not made.
    ceiling_beyond: as `beyond`, likewise.
    share: pair / ceiling; share_beyond: beyond / ceiling_beyond, the score. None without a ceiling, or where it is not
        above 0.
    rows: pairs; episodes: of which they are; folds: each held out once.
    """

    pair: Estimate
    still: Estimate
    known: Estimate | None
    present: Estimate
    beyond: Estimate
    ceiling: Estimate | None
    ceiling_beyond: Estimate | None
    share: Estimate | None
    share_beyond: Estimate | None
    rows: int
    episodes: int
    folds: int


def measure_motion(
    pair: Tensor,
    still: Tensor,
    target: Tensor,
    episode: Tensor,
    *,
    known: Tensor | None = None,
    supervised: Tensor | None = None,
    folds: int = 5,
    draws: int = 1000,
) -> Motion:
    """Measure what latent actions say about a target beyond the present frame, on episodes not fitted on.

    All regressions are ridge regressions with penalties chosen within the fitted episodes. Rows with NaN or infinite
    numbers are left out.

    Args:
        pair: [R, W] float, z of (I_t, I_t+C).
        still: [R, W] float, z of (I_t, I_t).
        target: [R, A] float: displacement, or the actions from t to t+C. Each is scaled to unit variance.
        episode: [R] int; rows of one episode are never on both sides of a split.
        known: [R, K] float, what is known at t: state, task one-hot.
        supervised: [R, L] float, what regressions or networks trained with labels say about each pair, without having
            seen its episode: :func:`~lara_adapter.lam.health.kernel.fit_kernels`, and
            :func:`~lara_adapter.lam.health.ceiling.train_ceiling`.
        folds: at most.
        draws: of the bootstrap.

    Raises:
        LaraArgumentError: numbers of rows that differ, fewer than three episodes, or a target that never changes.
    """
    parts = {"pair": pair, "still": still, "target": target, "known": known, "supervised": supervised}
    given = {name: part.detach().cpu().double() for name, part in parts.items() if part is not None}
    episode = episode.cpu()
    for name, part in given.items():
        if part.ndim != 2 or len(part) != len(episode):
            raise LaraArgumentError(f"{name} has shape {tuple(part.shape)}, but [{len(episode)}, numbers] is expected")
    keep = torch.stack([part.isfinite().all(1) for part in given.values()]).all(0)
    given, episode = {name: part[keep] for name, part in given.items()}, episode[keep]
    names, which = episode.unique(return_inverse=True)
    if len(names) < 3:
        raise LaraArgumentError(f"motion needs pairs of at least 3 episodes, but there are {len(names)}")
    y = given["target"]
    y = y[:, y.std(0) > 1e-9]
    if not y.shape[1]:
        raise LaraArgumentError("the target never changes")
    y = y / y.std(0)

    def errors(*blocks: Tensor) -> Tensor:
        """Squared error of each episode [E]."""
        return _per_episode((predict_held_out(blocks, y, episode, folds) - y).square().sum(1), which, len(names))

    mean = torch.empty_like(y)
    for test in fold_rows(episode, folds):
        mean[test] = y[~test].mean(0)
    spread = _per_episode((mean - y).square().sum(1), which, len(names))
    states = [] if "known" not in given else [_with_products(given["known"])]
    present = [*states, given["still"]]
    random = torch.Generator().manual_seed(0)
    pick = torch.randint(len(names), (draws, len(names)), generator=random)

    def explained(error: Tensor, base: Tensor) -> Tensor:
        """R^2 of all episodes, then of each draw of the bootstrap: [1 + draws]."""
        return 1 - torch.cat([error.sum()[None] / base.sum(), error[pick].sum(1) / base[pick].sum(1)])

    of_pair, of_present, of_both = errors(given["pair"]), errors(*present), errors(*present, given["pair"])
    r2, beyond = explained(of_pair, spread), explained(of_both, of_present)
    ceiling = ceiling_beyond = share = share_beyond = None
    if "supervised" in given:
        best = explained(errors(given["supervised"]), spread)
        best_beyond = explained(errors(*present, given["supervised"]), of_present)
        ceiling, ceiling_beyond = _estimate(best), _estimate(best_beyond)
        share, share_beyond = _ratio(r2, best), _ratio(beyond, best_beyond)
    return Motion(
        pair=_estimate(r2),
        still=_estimate(explained(errors(given["still"]), spread)),
        known=_estimate(explained(errors(*states), spread)) if states else None,
        present=_estimate(explained(of_present, spread)),
        beyond=_estimate(beyond),
        ceiling=ceiling,
        ceiling_beyond=ceiling_beyond,
        share=share,
        share_beyond=share_beyond,
        rows=len(episode),
        episodes=len(names),
        folds=min(folds, len(names)),
    )


def _with_products(known: Tensor) -> Tensor:
    """State and task with their squares, and with all their products if they are few: [R, K] -> [R, more]."""
    scaled = (known - known.mean(0)) / known.std(0).clamp_min(1e-6)
    if known.shape[1] > _CROSS:
        return torch.cat([scaled, scaled.square()], 1)
    rows, columns = torch.triu_indices(known.shape[1], known.shape[1])
    return torch.cat([scaled, scaled[:, rows] * scaled[:, columns]], 1)


def _per_episode(values: Tensor, which: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.double).index_add(0, which, values)


def _estimate(values: Tensor) -> Estimate:
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Estimate(float(values[0]), low, high)


def _ratio(values: Tensor, ceiling: Tensor) -> Estimate | None:
    """None where the ceiling is not safely above 0: a share of nothing says nothing."""
    if _estimate(ceiling).low <= 0 or math.isnan(float(ceiling[0])):
        return None
    return _estimate(values / ceiling)
