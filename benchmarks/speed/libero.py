"""Speed of the LIBERO adapter, beside the one before soft resets and cameras that render only when looked at.

    make libero-env
    git worktree add /tmp/before 3b4b438
    .venv-libero/bin/python -m benchmarks.speed.libero --before /tmp/before

Each arm is a process of its own, on the same task, with EGL on one thread; they take turns. Seconds of processor time,
which a busy machine changes least; what is reported is the median of the rounds' ratios. A reset includes ten steps in
which objects settle. The old adapter renders both cameras at every step, so a look costs it nothing more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT, markdown
from benchmarks.speed.measure import environment, medians, ranges, ratios, take_turns
from lara_adapter.storage.files import read_json, write_json

RESULT = RESULTS / "libero_speed.json"
STEPS = 16
WORK = {
    "reset": "reset",
    "step": "steps, no look",
    "eighth": "steps, a look at both views every eighth",
    "look": "steps, a look at both views at each",
}
ARM = """
import json, os, sys, time
import numpy as np
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from lara_adapter.integrations.simulators import open_simulator
settings, steps = json.loads(sys.argv[1]), int(sys.argv[2])
world = open_simulator("libero", **settings)
environment = world.open(world.tasks()[0])
seed, action = 0, np.float32([0.1, 0, 0, 0, 0, 0, 1])
environment.reset(seed)
environment.observe()
for line in sys.stdin:
    work = line.strip()
    begin = time.process_time()
    if work == "reset":
        seed += 1
        environment.reset(seed)
        count = 1
    else:
        every = {"step": steps + 1, "eighth": 8, "look": 1}[work]
        for step in range(steps):
            if step % every == 0 and every <= steps:
                environment.observe()
            environment.step(action)
        count = steps
    print((time.process_time() - begin) / count, file=out, flush=True)
environment.close()
"""


@contextlib.contextmanager
def arm(tree: Path, settings: dict[str, Any]) -> Iterator[Any]:
    """The adapter of a tree in a process; yields a function that measures seconds of a kind of work."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(tree / "lara_adapter", Path(folder, "lara_adapter"))
        shutil.copytree(tree / "integrations", Path(folder, "lara_adapter", "integrations"))
        variables = {
            **os.environ,
            "PYTHONPATH": folder,
            "MUJOCO_GL": "egl",
            "OMP_NUM_THREADS": "1",
            "LP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", ARM, json.dumps(settings), str(STEPS)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables,
            cwd=folder,
        ) as child:  # fmt: skip

            def measure(work: str) -> float:
                child.stdin.write(f"{work}\n")
                child.stdin.flush()
                return float(child.stdout.readline())

            yield measure
            child.stdin.close()


def make_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is written."""
    common = {"suite": "libero_object", "image_size": arguments.image_size}
    with (
        arm(arguments.before, common) as before,
        arm(ROOT, common) as now,
        arm(ROOT, {**common, "quality": "fast"}) as fast,
    ):
        arms = {"before": before, "now": now, "now, fast": fast}
        seconds = {
            work: take_turns(
                {name: (lambda run=run, work=work: run(work)) for name, run in arms.items()}, arguments.rounds
            )
            for work in WORK
        }
    speedup = {
        work: {name: [1 / ratio for ratio in values] for name, values in ratios(found, "before").items()}
        for work, found in seconds.items()
    }
    return {
        "times_as_many_as_before": {work: medians(found) for work, found in speedup.items()},
        "range": {work: ranges(found) for work, found in speedup.items()},
        "processor_seconds": {work: medians(found) for work, found in seconds.items()},
        "settings": {**common, "task": 0, "gl": "egl", "threads": 1, "rounds": arguments.rounds, "before": "3b4b438"},
        "environment": environment("cpu", ("mujoco", "robosuite", "numpy")),
    }


def section() -> str:
    """The table of the committed record."""
    record = read_json(RESULT)

    def cells(work: str) -> list[str]:
        middle, ends = record["times_as_many_as_before"][work], record["range"][work]
        return [markdown.spread(middle[name], *ends[name]) for name in ("now", "now, fast")]

    return markdown.table(
        ("a second, times as many as before", "`quality=libero`", "`quality=fast`"),
        [(f"{label}s" if work == "reset" else label, *cells(work)) for work, label in WORK.items()],
    )


SECTIONS = {"docs/serve.md": {"libero speed": section}}


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of 3b4b438")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    write_json(arguments.out, make_report(arguments))
    print(section() if arguments.out == RESULT else arguments.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
