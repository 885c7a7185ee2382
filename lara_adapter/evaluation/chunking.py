"""From chunks of predicted actions to the one that is done: open loop for a few steps, or a temporal ensemble."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import LaraArgumentError

__all__ = ["ChunkExecutor"]


class ChunkExecutor:
    """Decides when the policy is asked again, and what is done in between.

    Without an ensemble: of each chunk the first `execute` actions are done, then the policy is asked again. With one
    (ACT, Zhao et al. 2023, arXiv 2304.13705, section IV-B) the action of a step is the weighted mean of what all chunks
    that reach it predicted for it, with weights exp(-m * i), i = 0 for the oldest: a large m trusts the oldest, m = 0
    all alike. It averages numbers, so it suits positions and velocities, and not angles that wrap around.
    """

    def __init__(self, execute: int | None = None, ensemble: float | None = None) -> None:
        """Set up.

        Args:
            execute: k, steps between two questions; None: the whole chunk, with an ensemble 1.
            ensemble: m, at least 0; ACT takes 0.01. None: no ensemble.

        Raises:
            LaraArgumentError: a number is out of range.
        """
        if execute is not None and execute < 1:
            raise LaraArgumentError(f"execute={execute}, but at least one action of a chunk must be done")
        if ensemble is not None and not 0 <= ensemble < float("inf"):
            raise LaraArgumentError(f"ensemble={ensemble}, but a number of at least 0 is expected")
        self.execute = 1 if execute is None and ensemble is not None else execute
        self.ensemble = ensemble
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self._step = self._asked = 0
        self._chunks: list[tuple[int, NDArray[np.float32]]] = []  # (first step, chunk), the oldest first

    @property
    def wants_chunk(self) -> bool:
        """Whether the policy must be asked before the next action."""
        if not self._chunks:
            return True
        newest = len(self._chunks[-1][1])
        return self._step - self._asked >= min(self.execute or newest, newest)

    def add(self, chunk: NDArray[np.float32]) -> None:
        """Take the policy's answer for the present step on: [H, A].

        Raises:
            LaraArgumentError: it is no chunk.
        """
        if chunk.ndim != 2 or len(chunk) == 0:
            raise LaraArgumentError(f"chunk: [H, A] is expected, but {list(chunk.shape)} came")
        kept = [] if self.ensemble is None else [(at, old) for at, old in self._chunks if at + len(old) > self._step]
        self._chunks = [*kept, (self._step, chunk)]
        self._asked = self._step

    def next(self) -> NDArray[np.float32]:
        """The action [A] of the present step; the next step is then the present one.

        Raises:
            LaraArgumentError: no chunk reaches this step (see :attr:`wants_chunk`).
        """
        reaching = [chunk[self._step - at] for at, chunk in self._chunks if at + len(chunk) > self._step]
        if not reaching:
            raise LaraArgumentError("no chunk reaches this step: add one")
        self._step += 1
        if self.ensemble is None:
            return reaching[-1]
        weights = np.exp(-self.ensemble * np.arange(len(reaching), dtype=np.float64))
        mean: NDArray[np.float32] = (np.stack(reaching) * (weights / weights.sum())[:, None]).sum(0).astype(np.float32)
        return mean
