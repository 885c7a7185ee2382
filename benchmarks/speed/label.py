"""How much faster several processes label: `accelerate launch`, and shards with their merge.

    pip install -e ".[cli,lam,train,video,test]"
    python -m benchmarks.speed.label     # goes on with the rounds that are missing; --table prints the record

Frames per second over those of one process, in the same round; the arms take turns. Timed from the moment at which every
process has imported what it needs to the moment at which the output is there, the merge included. One thread of torch a
process; a second thread decodes ahead. The outputs of all arms are compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import RESULTS, markdown
from benchmarks.speed.measure import environment, ratios, take_turns
from lara_adapter import LatentActionConfig, LatentActionModel

RESULT = RESULTS / "label_processes.jsonl"
EPISODES, FRAMES, PIXELS, COUNTS = 32, 40, 128, (2, 4)
ALONE = "1 process"
# FOLDER COUNT NAME OUTPUT SHARD: one process of COUNT; prints when all of them began, and when it ended
WORKER = """
import logging, os, sys, time
from pathlib import Path
logging.disable()
import accelerate, av, pyarrow.parquet
from lara_adapter.lam.label import label_dataset
folder, count, name, output, shard = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
if shard != "merge":
    Path(f"{output}.ready-{name}{os.environ.get('RANK', '')}").touch()
    while len(list(folder.glob(Path(output).name + ".ready-*"))) < count:
        time.sleep(0.01)
how = {"merge": True} if shard == "merge" else {"shard": shard} if shard else {}
begin = time.time()
label_dataset(folder / "data", folder / "lam", output, gap=4, sidecar=True, device="cpu", **how)
sys.stdout.write(f"\\nTIMES {begin} {time.time()}\\n")  # one write: several processes share the pipe
"""


def run(commands: list[list[str]]) -> float:
    """Seconds from the first begin to the last end of processes that run at once."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    times: list[list[float]] = []
    for process in running:
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(error)
        times += [[float(part) for part in line.split()[1:]] for line in out.splitlines() if line.startswith("TIMES")]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def measure(folder: Path, number: int) -> dict[str, float]:
    """One round: frames per second of every arm over one process."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    outputs: dict[str, Path] = {}

    def command(arm: str, count: int, name: str, shard: str = "", launcher: tuple[str, ...] = ()) -> list[str]:
        outputs[arm] = folder / f"{number}-{arm.replace(' ', '-')}.parquet"
        return [sys.executable, *launcher, str(script), str(folder), str(count), name, str(outputs[arm]), shard]

    def shards(arm: str, count: int) -> float:
        labelled = run([command(arm, count, str(index), f"{index}/{count}") for index in range(count)])
        return labelled + run([command(arm, 1, "merge", "merge")])

    def launched(arm: str, count: int) -> float:
        options = ("--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0")
        options += ("--mixed_precision", "no", "--dynamo_backend", "no")
        # --multi_gpu is accelerate's word for several processes, on CPUs too
        return run([command(arm, count, "rank", "", ("-m", "accelerate.commands.launch", "--multi_gpu", *options))])

    arms: dict[str, Callable[[], float]] = {ALONE: lambda: run([command(ALONE, 1, "alone")])}
    for count in COUNTS:
        for name, measured in (("accelerate", launched), ("shards, merged", shards)):
            arm = f"{count} processes, {name}"
            arms[arm] = lambda arm=arm, count=count, measured=measured: measured(arm, count)  # type: ignore[misc]
    found = take_turns(arms, 1)
    contents = {path.read_bytes() for path in outputs.values()}
    if len(contents) > 1:
        raise RuntimeError("the outputs of the arms differ")
    return {arm: 1 / values[0] for arm, values in ratios(found, ALONE).items()}


def make_data(folder: Path) -> None:
    """A LAM and a dataset."""
    from tests.helpers.disk_datasets import make_v3

    torch.manual_seed(0)
    LatentActionModel(LatentActionConfig.tiny()).eval().save_pretrained(folder / "lam")

    make_v3(folder / "data", lengths=(FRAMES,) * EPISODES, per_file=4, pixels=PIXELS)


def read(path: Path) -> list[dict[str, Any]]:
    """The rounds that were measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def section() -> str:
    """The committed record in Markdown."""
    return table(read(RESULT))


def table(rounds: list[dict[str, Any]]) -> str:
    """The record in Markdown."""
    if not rounds:
        return "Not measured yet."
    lines = []
    for arm in rounds[0]["ratio"]:
        values = [each["ratio"][arm] for each in rounds]
        lines.append((arm, markdown.spread(median(values), min(values), max(values))))
    machine = rounds[0]["environment"]["machine"]
    return markdown.table((f"`lara label` on {machine}", "frames per second, over one process"), lines)


SECTIONS = {"benchmarks/README.md": {"label": section}}


def main() -> int:
    """Measure what is missing, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the record")
    arguments = parser.parse_args()
    if not arguments.table and len(read(arguments.out)) < arguments.rounds:
        with tempfile.TemporaryDirectory() as text:
            make_data(Path(text))
            for number in range(len(read(arguments.out)), arguments.rounds):
                made = {
                    "round": number,
                    "ratio": measure(Path(text), number),
                    "environment": environment("cpu", ("torch", "accelerate", "av")),
                    "frames": EPISODES * FRAMES,
                    "pixels": PIXELS,
                }
                with arguments.out.open("a") as file:
                    file.write(json.dumps(made) + "\n")
    print(table(read(arguments.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
