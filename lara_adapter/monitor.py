"""Warn when the latent action model collapses: a near-zero alignment loss is then no sign of success."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

__all__ = ["CollapseMonitor"]

logger = logging.getLogger(__name__)

_MEND = (
    "The alignment may be solved by a nearly constant latent action, and then a high cosine means nothing. Mend: {}a "
    "smaller lam_grad_scale (0.3, 0.1), or a smaller align_weight beside lam_weight"
)


class CollapseMonitor:
    """Looks at the metrics of every `every`-th training forward and warns once about each symptom.

    Symptoms, each against the first look, since a healthy LAM may start with a large constant part: the mean direction
    |E[z/|z|]|^2 is above `direction_limit` and what it leaves to 1 has halved; or the perplexity of the codes has
    halved. The number of codes in use is no sign: a quantiser that revives dead codes keeps it high.

    Attributes:
        every: training forwards between two looks.
        direction_limit: see above.
        contrastive: whether the alignment is the contrastive one already.
    """

    def __init__(self, every: int = 50, direction_limit: float = 0.8, contrastive: bool = False) -> None:
        self.every, self.direction_limit, self.contrastive = every, direction_limit, contrastive
        self._calls = 0
        self._first: dict[str, float] = {}
        self._warned: set[str] = set()

    def observe(self, values: Mapping[str, torch.Tensor | float], lam_trains: bool) -> None:
        """Count one training forward; at every `every`-th, compare (this reads values from the device)."""
        self._calls += 1
        if not lam_trains or (self._first and self._calls % self.every):
            return
        now = {name: float(values[name]) for name in ("mean_direction", "perplexity") if name in values}
        if not self._first:
            # a batch or two say little of a mean direction: the first look waits for some
            self._first = now if self._calls >= min(10, self.every) else {}
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

    def _warn(self, symptom: str, what: str) -> None:
        if symptom not in self._warned:
            self._warned.add(symptom)
            mend = _MEND.format("" if self.contrastive else "alignment='contrastive', ")
            logger.warning("LARA after %d training forwards: %s. %s", self._calls, what, mend)
