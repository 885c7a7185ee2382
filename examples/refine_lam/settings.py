"""Settings and presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from examples.demo.cli import check_settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings. The defaults are those of the preset "quick"."""

    preset: Literal["smoke", "quick", "full"] = "quick"
    """smoke: a minute or two, shows only that everything runs. quick: as the committed results. full: hours."""
    output: Path = Path("outputs/refine_lam")
    """Where results are written. Finished stages are kept in cache/, under names that depend on their settings."""
    report: Path | None = None
    """Run nothing: print the tables of the results in this folder, and redraw its picture."""
    markdown: bool = False
    """With --report: print the tables as Markdown."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each repeats the whole experiment with its own starts, LAM, weights, data order, noise and distractors."""
    tasks: tuple[str, ...] = ("button-press-topdown", "drawer-open")
    """Meta-World tasks with a scripted expert."""
    worlds: Literal["distractors", "clean", "both"] = "both"
    """Random squares and light in every frame, for the LAMs, the policies and the evaluation, or clean frames."""
    labelled: int = 10
    """Demonstrations per task with actions: for the joint training, for the heads that decode z, for the policies."""
    unlabelled: int = 25
    """Demonstrations per task whose actions only the ceiling "true labels" uses."""
    heldout: int = 10
    """Held-out demonstrations per task, for the measurements."""
    play: int = 25
    """Episodes of play video per task, to train the plain LAM."""
    play_steps: int = 112
    """Steps of each play episode."""
    lam_steps: int = 400
    """Training steps of the plain LAM."""
    joint_steps: int = 200
    """Further steps of the control and of the joint training with a policy."""
    batch: int = 16
    """Rows per batch of the LAMs and of the joint training."""
    policy_batch: int = 16
    """Rows per batch of the policies that learn from tokens or labels."""
    lr: float = 5e-4
    """Peak learning rate of all models; it falls along a cosine."""
    align_weight: float = 0.1
    """w1 of LARA, Eq. 7, as in the demo."""
    lam_weight: float = 0.1
    """w2."""
    pretrain_steps: int = 200
    """Steps of the latent-token policy on tokens of action-free video."""
    finetune_steps: int = 200
    """Steps of the latent-token policy on the labelled demonstrations."""
    policy_steps: int = 200
    """Steps of each diffusion policy on true or pseudo-labels."""
    episodes: int = 10
    """Closed-loop episodes per task and policy."""
    max_steps: int = 150
    """Steps after which an episode counts as failed."""
    execute: int = 8
    """Actions executed of each chunk of 16."""
    workers: int = 2
    """Parallel processes, one thread each."""

    def __post_init__(self) -> None:
        check_settings(self)
        if min(self.seeds) < 0:
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: a seed is >= 0")


PRESETS = {
    "quick": Settings(),
    "smoke": Settings(
        preset="smoke",
        seeds=(0,),
        worlds="distractors",
        labelled=2,
        unlabelled=2,
        heldout=2,
        play=2,
        lam_steps=12,
        joint_steps=8,
        batch=8,
        policy_batch=8,
        pretrain_steps=8,
        finetune_steps=8,
        policy_steps=8,
        episodes=2,
        max_steps=16,
    ),
    "full": Settings(
        preset="full",
        seeds=tuple(range(8)),
        unlabelled=50,
        heldout=25,
        play=100,
        lam_steps=2000,
        joint_steps=2000,
        batch=32,
        policy_batch=32,
        pretrain_steps=2000,
        finetune_steps=1500,
        policy_steps=2000,
        episodes=100,
    ),
}
