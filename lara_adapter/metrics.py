"""The history of metrics, and the warning when the latent action model collapses."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

__all__ = ["CollapseMonitor", "History", "without_negatives"]

logger = logging.getLogger(__name__)

_FIX = (
    "The alignment may be solved by a nearly constant latent action, and then a high cosine means nothing. Fix: {}a "
    "smaller lam_grad_scale (0.3, 0.1), or a smaller align_weight relative to lam_weight"
)


def without_negatives(pairs: float, batch: int | None = None) -> str | None:
    """What is wrong where a contrastive alignment has no negatives; None where it has some. See `observe_negatives`."""
    if pairs >= 2:
        return None
    of_batch = "" if batch is None else f", in a batch of {batch} on this rank"
    return (
        f"the contrastive alignment has no negatives: valid pairs of all ranks {pairs:.0f}{of_batch}, at least 2 are "
        "needed. Its loss is then 0 and aligns nothing. Gradient accumulation does not add negatives: they come from one "
        "forward. Fix: a larger batch per forward, more ranks, or alignment='cosine'"
    )


class CollapseMonitor:
    """Checks the metrics of every `every`-th training forward and warns once about each symptom.

    Symptoms, compared to the first check, since a healthy LAM may start with a large constant part: the mean direction d =
    |E[z/|z|]|^2 is above `direction_limit` and 1 - d has halved; or the perplexity of the codes has halved. The number of
    codes in use is not a symptom: a quantiser that revives dead codes keeps it high.

    Attributes:
        every: training forwards between two checks.
        direction_limit: see above.
        contrastive: whether the alignment is already the contrastive one.
    """

    def __init__(self, every: int = 50, direction_limit: float = 0.8, contrastive: bool = False) -> None:
        self.every, self.direction_limit, self.contrastive = every, direction_limit, contrastive
        self._calls = 0
        self._first: dict[str, float] = {}
        self._warned: set[str] = set()

    def observe(self, values: Mapping[str, torch.Tensor | float], lam_trains: bool) -> None:
        """Count one training forward; at every `every`-th, compare (this reads values from the device)."""
        self._calls += 1
        # the mean direction needs some batches before it means anything
        if not lam_trains or (self._calls % self.every if self._first else self._calls < min(10, self.every)):
            return
        now = {name: float(values[name]) for name in ("mean_direction", "perplexity") if name in values}
        if not self._first:
            self._first = now
            return
        direction, perplexity = now.get("mean_direction"), now.get("perplexity")
        if direction is not None and direction > self.direction_limit:
            first = self._first["mean_direction"]
            if 1 - direction < 0.5 * (1 - first):
                self._warn(
                    "direction",
                    f"mean direction of the latent action rose from {first:.2f} to {direction:.2f} (1: constant)",
                )
        if perplexity is not None and perplexity < 0.5 * self._first["perplexity"]:
            first = self._first["perplexity"]
            self._warn("perplexity", f"perplexity of the codes fell from {first:.1f} to {perplexity:.1f}")

    def observe_negatives(self, pairs: float, batch: int | None = None) -> None:
        """Warn once where a contrastive alignment compares fewer than two pairs.

        Args:
            pairs: valid pairs of all ranks.
            batch: samples of this rank's batch, where known.
        """
        problem = without_negatives(pairs, batch)
        if problem and "negatives" not in self._warned:
            self._warned.add("negatives")
            logger.warning("LARA: %s", problem)

    def _warn(self, symptom: str, what: str) -> None:
        if symptom not in self._warned:
            self._warned.add(symptom)
            fix = _FIX.format("" if self.contrastive else "alignment='contrastive', ")
            logger.warning("LARA after %d training forwards: %s. %s", self._calls, what, fix)


class History:
    """Metrics by step, at most `limit` of them: when it is full, every second one is dropped. Filled by `lara.metrics()`.

    Attributes:
        limit: points kept.
        points: (step, metrics), in the order of the steps.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.points: list[tuple[int, dict[str, float]]] = []
        self._stride = 1

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step, unless one close to it is there; a step back drops the later ones."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        if self.points and step - self.points[-1][0] < self._stride:
            return
        self.points.append((step, dict(values)))
        if len(self.points) > self.limit:
            self.points = self.points[::2]
            self._stride = max(1, (self.points[-1][0] - self.points[0][0]) // (len(self.points) - 1))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(step, values[name]) for step, values in self.points if name in values]
        return [step for step, _ in points], [value for _, value in points]
