"""How often LIBERO's scripted expert succeeds, from random starts that it was not made with.

    python -m benchmarks.success.libero_expert --suite libero_object
    python -m benchmarks.success.libero_expert --suite libero_spatial

In LIBERO's environment (make libero-env). Nothing is rendered. Episodes that the record holds are not run again.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from lara_adapter.integrations.simulators.libero import LiberoEnvironment

from benchmarks import RESULTS, markdown
from benchmarks.success.rows import append_row, read_rows
from examples.libero.expert import Expert
from examples.libero.scene import Scene
from examples.libero.starts import PlainLibero
from lara_adapter.errors import LaraError
from lara_adapter.evaluation.report import wilson_interval

ROWS = RESULTS / "libero_expert.jsonl"
NOISE = 0.1  # on the hand's movement, as in the recorded demonstrations


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    suite: str = "libero_object"
    """libero_object or libero_spatial."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Numbers of tasks."""
    episodes: int = 20
    """Episodes of each task."""
    seed: int = 10_000
    """Of the first episode; each further one has the next. Recordings of demonstrations have other starts."""
    output: Path = ROWS
    """A line of JSON for each episode is added to this file."""

    def known(self) -> dict[tuple[int, int], dict[str, Any]]:
        """Rows of the suite in the file, by task and seed."""
        return {(row["task"], row["seed"]): row for row in read_rows(self.output) if row["suite"] == self.suite}


def run(environment: LiberoEnvironment, seed: int) -> dict[str, float]:
    """One episode: whether it succeeded, its steps, the attempts to grasp, and processor time in seconds."""
    begin = time.process_time()
    environment.reset(seed)
    expert, steps, solved = Expert(NOISE, seed=seed), 0, False
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
        world = PlainLibero(suite=settings.suite, gripper="raw", privileged=True)
    except LaraError as problem:
        print(problem, file=sys.stderr)
        return 2
    names, known = world.tasks(), settings.known()
    for number in settings.tasks:
        missing = [
            seed for seed in range(settings.seed, settings.seed + settings.episodes) if (number, seed) not in known
        ]
        environment = world.open(names[number]) if missing else None
        for seed in missing:
            row = {"suite": settings.suite, "task": number, "seed": seed, **run(environment, seed)}
            append_row(settings.output, row)
            print(row, flush=True)
        if environment is not None:
            environment.close()
    print(section(settings.output))
    return 0


def section(file: Path = ROWS) -> str:
    """The table of a file of rows."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(file):
        groups[row["suite"], row["task"]].append(row)
    cells: dict[str, list[str]] = {}
    for suite in dict.fromkeys(suite for suite, _ in groups):
        tasks = [groups[key] for key in sorted(groups) if key[0] == suite]
        won = [sum(row["success"] for row in rows) for rows in tasks]
        everything = [row for rows in tasks for row in rows]
        low, high = wilson_interval(sum(won), len(everything))
        steps = fmean(row["steps"] for row in everything)
        cells[suite] = [
            ", ".join(f"{count}/{len(rows)}" for count, rows in zip(won, tasks, strict=True)),
            f"{sum(won)}/{len(everything)} ({100 * low:.1f} to {100 * high:.1f} %)", f"{steps:.0f}",
        ]  # fmt: skip
    head = ("suite", "tasks 0, 1, ...", "all (95 % interval)", "steps")
    return markdown.table(head, [(f"`{suite}`", *row) for suite, row in cells.items()])


SECTIONS = {"examples/libero/README.md": {"expert": section}}


if __name__ == "__main__":
    sys.exit(main())
