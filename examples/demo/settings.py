"""Settings that the demo shares with benchmarks/success."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Tasks, amounts of data and training, and the evaluation."""

    tasks: tuple[str, ...] = ("button-press-topdown", "drawer-open")
    """Meta-World tasks with a scripted expert."""
    demos: int = 10
    """Demonstrations per task to train on."""
    heldout: int = 15
    """Held-out demonstrations per task, for the measurements."""
    play: int = 40
    """Episodes of play video per task; their actions are thrown away."""
    play_steps: int = 112
    """Steps of each play episode."""
    lam_steps: int = 600
    """Training steps of the latent action model."""
    policy_steps: int = 600
    """Training steps of each policy and of the control."""
    batch: int = 32
    """Rows per batch."""
    lr: float = 5e-4
    """Peak learning rate of all models; it falls along a cosine."""
    episodes: int = 50
    """Closed-loop episodes per task and policy."""
    max_steps: int = 150
    """Steps after which an episode counts as failed."""
    execute: int = 8
    """Actions executed of each chunk of 16."""
    workers: int = 2
    """Parallel processes, one thread each."""
