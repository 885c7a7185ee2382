"""What LARA costs as the work grows: batch, views, frame size, processes, data to label; and what importing it costs.

    pip install -e ".[demo,train,video,test]"
    python -m benchmarks.speed.growth     # or some of: import step ranks lam label; --table prints the record

Each number is a ratio to something measured in turn with it, in the same process where there is one: the median of the
rounds' ratios, and their range. Nothing here is an absolute time. Of one process's work it is the processor's time,
which other work on the machine does not enter; of several ranks it is the clock's. One thread a process.

    import   a fresh interpreter that imports torch and lara_adapter, over one that imports torch alone
    step     the demo's training step with joint LARA, over the same without; by batch, views, pixels of a frame
    ranks    the same under DDP on one and two gloo ranks, one thread each; contrastive, which gathers latents from all
    lam      a training step of the LAM per pair, over that at batch 8
    label    labelling a dataset on disk per frame, over a dataset of a quarter of the length; its peak memory likewise;
             and `encode_sequence`, which encodes each frame once, over encoding each pair on its own
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import multiprocessing

from benchmarks import RESULTS, markdown
from benchmarks.speed.measure import environment, ratios, take_turns
from benchmarks.speed.overhead_hosts import build
from benchmarks.speed.step_overhead import measure_time, scalar_loss
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.storage.files import read_json, write_json

RESULT = RESULTS / "growth.json"
READING = (
    "Views cost a pass of the LAM each in this record; since then they share one (counts, above). The size of the frames "
    "costs only their resizing; ranks nothing but the gathering of latents. Labelling is linear in the data, at constant "
    "memory. "
)
HEAVY = ("transformers", "peft", "accelerate", "torchvision", "matplotlib", "av", "zmq")
LABEL = """
import resource, sys, logging
logging.disable()
from lara_adapter.lam.label import label_dataset
label_dataset(*sys.argv[1:4], gap=4, batch_size=32, device="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

Ratio = dict[str, Any]  # {"median": ..., "range": [lowest, highest]}


def time_once(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """How long it takes once, by a clock."""
    begin = clock()
    work()
    return clock() - begin


def children_time() -> float:
    """Processor time of the processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def compare_arms(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, Ratio]:
    """Call each arm in every round, back and forth; each one's ratios to the first, as median and range."""
    found = take_turns(arms, rounds)
    return {name: ratio(values) for name, values in ratios(found, next(iter(arms))).items()}


def ratio(values: list[float]) -> Ratio:
    """A median and its range."""
    return {"median": median(values), "range": [min(values), max(values)]}


def measure_import(rounds: int) -> dict[str, Any]:
    """What `import lara_adapter` adds to `import torch`, and which heavy packages it brings."""
    probe = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"

    def fresh(code: str) -> Callable[[], float]:
        return lambda: time_once(lambda: subprocess.run([sys.executable, "-c", code], check=True), children_time)

    arms = {
        "import torch": fresh("import torch"),
        "import torch, lara_adapter": fresh("import torch, lara_adapter"),
        "from lara_adapter import attach_lara, LatentActionModel": fresh(
            "import torch; from lara_adapter import attach_lara, LatentActionModel"
        ),
    }
    for arm in arms.values():
        arm()  # the disk's cache
    brought = subprocess.run(
        [sys.executable, "-c", f"from lara_adapter import attach_lara, LatentActionModel; {probe}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {"ratio": compare_arms(arms, rounds), "heavy_packages": brought.stdout.split()}


def measure_step(rounds: int) -> dict[str, Any]:
    """Joint LARA over the demo's policy alone, one thing grown at a time from batch 32, one view, 64 pixels."""
    found: dict[str, Any] = {}
    for what, sizes in (("batch", (8, 32, 128)), ("views", (1, 2, 4)), ("frame_size", (64, 128, 256))):
        for size in sizes:
            settings = {"batch": 32, "views": 1, "frame_size": 64, what: size}
            arguments = argparse.Namespace(
                host="demo", lam="tiny", perceptual=False, rounds=rounds, steps=3, warmup=1, dtype="float32",
                compile=False, device="cpu", ways=["joint"], **settings,
            )  # fmt: skip
            *_, measured = measure_time(arguments)
            found.setdefault(what, {})[str(size)] = ratio(measured.ratio["joint"])
    return found


def _rank(rank: int, world: int, port: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    host = build("demo")
    frames = torch.randint(0, 256, (32, 1, 2, 3, 64, 64), dtype=torch.uint8)
    alone, with_frames = host.inputs(32, None), host.inputs(32, frames)
    lam = LatentActionModel(LatentActionConfig.tiny())
    relative = []
    for _ in range(rounds):
        took = []
        for lara in (False, True):
            adapter = attach_lara(host.policy, lam, alignment="contrastive") if lara else None
            policy = torch.nn.parallel.DistributedDataParallel(host.policy, find_unused_parameters=True)
            inputs = with_frames if lara else alone
            steps = [time_once(lambda: scalar_loss(policy(inputs)).backward(), time.perf_counter) for _ in range(4)]  # noqa: B023
            took.append(median(steps[1:]))
            if adapter is not None:
                adapter.detach()
        relative.append(took[1] / took[0])
    if rank == 0:
        results.put(relative)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure_ranks(rounds: int) -> dict[str, Any]:
    """Joint contrastive LARA over the policy alone, under DDP, batch 32 a rank."""
    found = {}
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        multiprocessing.spawn(_rank, (world, port, rounds, results), nprocs=world)
        found[str(world)] = ratio(results.get())
    return found


def measure_lam(rounds: int) -> dict[str, Ratio]:
    """Seconds a pair of the LAM's training step, by batch."""
    lam = LatentActionModel(LatentActionConfig.tiny()).train()

    def step(batch: int) -> Callable[[], float]:
        present, future = torch.rand(2, batch, 3, 64, 64)

        def once() -> float:
            return min(time_once(lambda: lam(present, future).loss.backward()) for _ in range(3)) / batch

        return once

    return compare_arms({str(batch): step(batch) for batch in (8, 32, 128)}, rounds)


@contextlib.contextmanager
def datasets(sizes: tuple[int, ...]) -> Iterator[tuple[Path, Path, dict[int, Path]]]:
    """A folder with a LAM and datasets of so many episodes of 40 frames, 64 pixels."""
    from tests.helpers.disk_datasets import make_v3

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        LatentActionModel(LatentActionConfig.tiny()).eval().save_pretrained(folder / "lam")
        made = {size: make_v3(folder / f"data{size}", lengths=(40,) * size, pixels=64, per_file=10) for size in sizes}
        yield folder, folder / "lam", made


def measure_label(rounds: int) -> dict[str, Any]:
    """Labelling by length of the dataset: time a frame, peak memory; and what encoding each frame once saves."""
    from lara_adapter.lam.label import label_dataset
    from lara_adapter.lam.sequence import encode_sequence

    with datasets((10, 20, 40)) as (folder, lam, made):
        names = iter(range(10**6))

        def label(size: int) -> Callable[[], float]:
            def once() -> float:
                output = folder / f"out{next(names)}"
                return (
                    time_once(lambda: label_dataset(made[size], lam, output, gap=4, batch_size=32, device="cpu")) / size
                )

            return once

        time_a_frame = compare_arms({str(size * 40): label(size) for size in made}, rounds)
        peak = {}
        for size in made:
            command = [sys.executable, "-c", LABEL, made[size], lam, folder / f"out{next(names)}"]
            done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
            peak[size] = float(done.stdout.split()[-1])
    model = LatentActionModel(LatentActionConfig.tiny()).eval()
    frames = torch.randint(0, 256, (260, 64, 64, 3), dtype=torch.uint8)
    pictures = frames.permute(0, 3, 1, 2)

    def each_pair() -> None:
        with torch.inference_mode():
            for start in range(0, 256, 64):
                model.encode(pictures[start : start + 64], pictures[start + 4 : start + 68])

    once = compare_arms(
        {
            "each pair on its own": lambda: time_once(each_pair),
            "encode_sequence": lambda: time_once(lambda: encode_sequence(model, list(frames.numpy()), 4)),
        },
        rounds,
    )
    return {
        "time_a_frame": time_a_frame,
        "peak_memory": {str(size * 40): value / peak[10] for size, value in peak.items()},
        "encoding": once,
    }


MEASURES = {
    "import": measure_import, "step": measure_step, "ranks": measure_ranks, "lam": measure_lam, "label": measure_label,
}  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The record in Markdown, as far as it goes."""
    lines = []
    label = record.get("label", {})
    for title, found in {
        "starting Python": record.get("import", {}).get("ratio", {}),
        "training step with LARA over without, by batch": record.get("step", {}).get("batch", {}),
        "the same by views": record.get("step", {}).get("views", {}),
        "the same by pixels of a frame": record.get("step", {}).get("frame_size", {}),
        "the same under DDP, contrastive, by ranks": record.get("ranks", {}),
        "LAM training step per pair, by batch": record.get("lam", {}),
        "labelling per frame, by frames of the dataset": label.get("time_a_frame", {}),
        "encoding an episode": label.get("encoding", {}),
    }.items():
        for size, value in sorted(found.items(), key=_order):
            lines.append((title, size, markdown.spread(value["median"], *value["range"])))
    for size, value in sorted(label.get("peak_memory", {}).items(), key=_order):
        lines.append(("peak memory of labelling, by frames of the dataset", size, f"{value:.2f}"))
    return markdown.table(("what grows", "", "ratio, median (range)"), lines)


def section() -> str:
    """The table of the committed record, and what importing brings."""
    record = read_json(RESULT)
    if record["import"]["heavy_packages"]:
        raise ValueError(f"import lara_adapter brings {record['import']['heavy_packages']}")
    brought = f"`import lara_adapter` brings none of {', '.join(HEAVY[:-1])} or {HEAVY[-1]}."
    return f"{table(record)}\n\n{markdown.paragraph(READING + brought)}"


SECTIONS = {"benchmarks/README.md": {"growth": section}}


def _order(item: tuple[str, Any]) -> tuple[float, str]:
    """Sizes by number; other arms as the record has them, what they are relative to first."""
    size, value = item
    return (float(size), "") if size.isdigit() else (abs(value["median"] - 1.0), size)


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], *MEASURES], default=[], help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the record")
    arguments = parser.parse_args()
    record = read_json(arguments.out) if arguments.out.exists() else {}
    if not arguments.table:
        for what in arguments.what or MEASURES:
            record[what] = MEASURES[what](arguments.rounds)
            record["rounds"] = arguments.rounds
            record["environment"] = environment("cpu")
            write_json(arguments.out, record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
