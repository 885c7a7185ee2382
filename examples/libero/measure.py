"""How often the scripted expert succeeds.

    MUJOCO_GL=egl python -m examples.libero.measure --suite libero_object --seed 1000 --episodes 20

Nothing is rendered. `--stored` uses LIBERO's stored starts instead of random ones.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from lara_adapter.integrations.simulators.libero import Libero, LiberoEnvironment

from examples.libero.expert import Expert
from examples.libero.scene import Scene
from examples.libero.starts import PlainLibero
from lara_adapter.errors import LaraError
from lara_adapter.evaluation.report import wilson_interval


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    suite: str = "libero_object"
    """libero_object or libero_spatial."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Numbers of tasks."""
    episodes: int = 20
    """Episodes of each task."""
    seed: int = 0
    """Of the first episode; each further one has the next."""
    noise: float = 0.0
    """Standard deviation of noise on the hand's movement."""
    stored: bool = False
    """LIBERO's stored starts."""
    output: Path | None = None
    """A line of JSON for each episode is added to this file."""


def run(environment: LiberoEnvironment, seed: int, noise: float) -> dict[str, float]:
    """One episode: whether it succeeded, its steps, the attempts to grasp, and processor time in seconds."""
    begin = time.process_time()
    environment.reset(seed)
    expert, steps, solved = Expert(noise, seed=seed), 0, False
    while not solved and steps < environment.max_steps:
        solved = environment.step(expert.act(Scene(environment.observe([]).states)))
        steps += 1
    seconds = round(time.process_time() - begin, 2)
    return {"success": solved, "steps": steps, "attempts": expert.attempts, "seconds": seconds}


def main() -> int:
    """Measure; returns the exit status."""
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    try:
        world = (Libero if settings.stored else PlainLibero)(suite=settings.suite, gripper="raw", privileged=True)
    except LaraError as problem:
        print(problem, file=sys.stderr)
        return 2
    names, total = world.tasks(), 0
    print(f"{'task':<82}{'success':>9}{'steps':>7}{'attempts':>10}{'s/episode':>11}")
    for number in settings.tasks:
        environment, rows = world.open(names[number]), []
        for seed in range(settings.seed, settings.seed + settings.episodes):
            row = run(environment, seed, settings.noise)
            rows.append(row)
            if settings.output is not None:
                with settings.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"suite": settings.suite, "task": number, "seed": seed, **row}) + "\n")
        environment.close()
        won, (steps, attempts, seconds) = sum(row["success"] for row in rows), (
            sum(row[name] for row in rows) / len(rows) for name in ("steps", "attempts", "seconds")
        )  # fmt: skip
        total += won
        print(f"{names[number]:<82}{won:>4} /{len(rows):>3}{steps:>7.0f}{attempts:>10.2f}{seconds:>11.1f}", flush=True)
    count = len(settings.tasks) * settings.episodes
    low, high = wilson_interval(int(total), count)
    print(f"{'all':<82}{total:>4} /{count:>3}   95 % interval {low:.3f} to {high:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
