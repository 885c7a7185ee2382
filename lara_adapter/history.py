"""The metrics of a training so far, in bounded memory; the model card's picture is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["History"]


class History:
    """Metrics by step, at most `limit` of them: when it is full, every second one goes.

    It is filled by `lara.metrics()`, so by whatever logs them.

    Attributes:
        limit: points kept.
        points: (step, metrics), in the order of the steps.
    """

    def __init__(self, limit: int = 256) -> None:
        self.limit = limit
        self.points: list[tuple[int, dict[str, float]]] = []
        self._stride = 1

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the metrics of a step, unless one too near to it is kept; a step back drops what came after it."""
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
        kept = [(step, values[name]) for step, values in self.points if name in values]
        return [step for step, _ in kept], [value for _, value in kept]
