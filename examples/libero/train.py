"""Training of the policies on a recording: MiniVLA at LIBERO's shapes, or LeRobot's Multi-Task DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.demo.stages import Job, Progress
from examples.demo.train import train_policy
from examples.libero.dataset import VIEWS
from examples.libero.served import describe
from examples.libero.tables import ACTION, STATE, make_tables
from examples.mini_vla import MiniVLAConfig

SHAPES: dict[str, Any] = {"action_dim": ACTION, "state_dim": STATE, "views": tuple(VIEWS)}
WEIGHTS = {"align_weight": 0.1, "lam_weight": 0.1}
# arguments of `attach_lara`; None: no LARA
ARMS: dict[str, dict[str, Any] | None] = {
    "dit_only": None,
    "lara_cosine": WEIGHTS,
    "lara_contrastive": {**WEIGHTS, "alignment": "contrastive"},
}


def table_jobs(root: Path, tasks: list[str], splits: dict[str, list[int]]) -> list[Job]:
    """Jobs of :func:`make_tables`, one for each task; each is one folder of `data` for :func:`train`."""
    count = len(VIEWS) * sum(last - first for first, last in splits.values())
    return [Job(f"table-{task}", make_tables, {"root": root, "task": task, "splits": splits}, count) for task in tasks]


def train(
    folder: Path, progress: Progress, *, instructions: list[str], config: dict[str, Any] | None = None, **options: Any
) -> None:
    """Train a MiniVLA. A job.

    Args:
        folder: gets what `examples.demo.train.train_policy` writes, and what :mod:`examples.libero.served` reads.
        progress: called after each step.
        instructions: text of each task.
        config: fields of `MiniVLAConfig` to change, beside LIBERO's shapes.
        options: of `train_policy`.
    """
    shapes = {**SHAPES, **(config or {})}
    train_policy(folder, progress, distractors=False, config=shapes, **options)
    describe(folder, MiniVLAConfig(num_tasks=len(instructions), **shapes), instructions)


def lerobot_command(
    arm: str, root: Path, lam: Path, output: Path, *, steps: int, batch: int, lr: float, seed: int
) -> list[str]:
    """The command line that trains LeRobot's Multi-Task DiT, small, on a recording: `examples/lerobot_posttrain.py`."""
    options = ARMS[arm]
    flags = ["--no-lara"] if options is None else ["--lam", str(lam), "--views", VIEWS["image"]]
    for name, value in (options or {}).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    numbers = {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "save-every": max(1, steps // 4), "episodes": 0}
    flags += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    resume = ["--resume"] if output.exists() else []
    script = str(Path(__file__).parents[1] / "lerobot_posttrain.py")
    return [script, "--root", str(root), "--tiny", "--output", str(output), *flags, *resume]
