"""From predicted action chunks to the action of a step: open loop for a few steps, or a temporal ensemble."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import LaraArgumentError

__all__ = ["ChunkExecutor"]


class ChunkExecutor:
    """Decides when the policy is called, and which action is executed.

    Without an ensemble the first `execute` actions of each chunk are executed, then the policy is called again. With one
    (ACT, Zhao et al. 2023, arXiv 2304.13705, section IV-B) the action of a step is the weighted mean of the predictions
    of all chunks that cover it, with weights exp(-m * i), i = 0 for the oldest: a large m trusts the oldest, m = 0 all
    equally. Means suit positions and velocities, not angles that wrap around.
    """

    def __init__(self, execute: int | None = None, ensemble: float | None = None) -> None:
        """Set up.

        Args:
            execute: k, steps between two calls of the policy; None: the whole chunk, 1 with an ensemble.
            ensemble: m >= 0; ACT uses 0.01. None: no ensemble.

        Raises:
            LaraArgumentError: a number is out of range.
        """
        if execute is not None and execute < 1:
            raise LaraArgumentError(f"execute={execute}, but at least 1 is expected")
        if ensemble is not None and not 0 <= ensemble < float("inf"):
            raise LaraArgumentError(f"ensemble={ensemble}, but a number of at least 0 is expected")
        self.execute = 1 if execute is None and ensemble is not None else execute
        self.ensemble = ensemble
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self._step = self._called = 0
        self._chunks: list[tuple[int, NDArray[np.float32]]] = []  # (first step, chunk), the oldest first

    @property
    def wants_chunk(self) -> bool:
        """Whether the policy must be called before the next action."""
        if not self._chunks:
            return True
        newest = len(self._chunks[-1][1])
        return self._step - self._called >= min(self.execute or newest, newest)

    def add(self, chunk: NDArray[np.float32]) -> None:
        """Add the chunk [H, A] that was predicted at the present step.

        Raises:
            LaraArgumentError: it has another shape or is empty.
        """
        if chunk.ndim != 2 or len(chunk) == 0:
            raise LaraArgumentError(f"chunk: got {list(chunk.shape)}, but [H, A] is expected")
        kept = [] if self.ensemble is None else [(at, old) for at, old in self._chunks if at + len(old) > self._step]
        self._chunks = [*kept, (self._step, chunk)]
        self._called = self._step

    def next(self) -> NDArray[np.float32]:
        """Return the action [A] of the present step, and advance to the next.

        Raises:
            LaraArgumentError: no chunk covers this step (see :attr:`wants_chunk`).
        """
        predicted = [chunk[self._step - at] for at, chunk in self._chunks if at + len(chunk) > self._step]
        if not predicted:
            raise LaraArgumentError("no chunk covers this step: add one")
        self._step += 1
        if self.ensemble is None:
            return predicted[-1]
        weights = np.exp(-self.ensemble * np.arange(len(predicted), dtype=np.float64))
        mean: NDArray[np.float32] = (np.stack(predicted) * (weights / weights.sum())[:, None]).sum(0).astype(np.float32)
        return mean
