"""Warn when the latent action model collapses: a near-zero alignment loss is then no sign of success."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

__all__ = ["CollapseMonitor"]

logger = logging.getLogger(__name__)

_MEND = (
    "The alignment is being solved by a nearly constant latent action. Mend: alignment='contrastive', a smaller "
    "lam_grad_scale (0.3, 0.1), or a smaller align_weight beside lam_weight"
)


class CollapseMonitor:
    """Looks at the metrics of every `every`-th training forward and warns once about each symptom.

    Symptoms: mean direction |E[z/|z|]|^2 above `direction_limit`, or perplexity of the codes below half of what it
    was at the first look.
    """

    def __init__(self, every: int = 50, direction_limit: float = 0.8) -> None:
        self.every, self.direction_limit = every, direction_limit
        self._calls = 0
        self._first_perplexity: float | None = None
        self._warned: set[str] = set()

    def observe(self, values: Mapping[str, torch.Tensor | float], lam_trains: bool) -> None:
        """Count one training forward; at every `every`-th, compare (this reads values from the device)."""
        self._calls += 1
        if not lam_trains or self._calls % self.every:
            return
        direction = float(values.get("mean_direction", 0.0))
        if direction > self.direction_limit:
            self._warn("direction", f"mean direction of the latent action is {direction:.2f} (1: constant)")
        if "perplexity" in values:
            perplexity = float(values["perplexity"])
            if self._first_perplexity is None:
                self._first_perplexity = perplexity
            elif perplexity < 0.5 * self._first_perplexity:
                self._warn(
                    "perplexity", f"perplexity of the codes fell from {self._first_perplexity:.1f} to {perplexity:.1f}"
                )

    def _warn(self, symptom: str, what: str) -> None:
        if symptom not in self._warned:
            self._warned.add(symptom)
            logger.warning("LARA after %d training forwards: %s. %s", self._calls, what, _MEND)
