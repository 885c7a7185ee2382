"""What LARA adds to a policy's training step: time, and where it goes; and that nothing is left after detach().

    python -m benchmarks.speed.step_overhead --host demo                       # the demo's policy, its small LAM
    python -m benchmarks.speed.step_overhead --host lerobot:pi05               # any policy of LeRobot, in its environment
    python -m benchmarks.speed.step_overhead --host lerobot-full:smolvla --lam paper --batch 2   # full size
    python -m benchmarks.speed.step_overhead --host gr00t-head --lam paper     # in GR00T's; PYTHONPATH has its checkout
    python -m benchmarks.speed.step_overhead --host gr00t --lam paper --perceptual --batch 4 --rounds 3 --steps 1 --warmup 0
    python -m benchmarks.speed.step_overhead --table                           # the committed rows

One policy, one process: in every round LARA is attached in one way after the other, in turn and in reverse, some steps
(forward and backward, no optimizer) are timed, and LARA is detached. Reported are medians of the rounds' ratios to the
policy alone; on a CPU of processor time, which other work on the machine does not enter, in one thread unless
OMP_NUM_THREADS says otherwise. The ways build on each other, so that their differences say where the time goes:

    idle         attached with both weights 0
    tap          the hook, the entry, the token and the cosine; a LAM and a projector that cost nothing
    projector    the same with the MLP projector
    frozen       a frozen LAM (Eq. 5): its encoder and inverse dynamics run forward
    joint        LARA (Eq. 7)
    joint/4      the same, with a quarter of the pairs reconstructed (reconstruct=0.25)
    cached       joint with the feature cache (for LAMs with a frozen image encoder)
    cached/4     both
    detached     after detach(): has to be 1.00

GR00T's head stands behind a VLM that costs nothing (gr00t-head), or behind matrix products that cost what its own does
(gr00t). --perceptual adds the work of LPIPS's VGG16. --warmup 0: one round before the first warms up, and the operations
of a step are counted in it.

Peak memory (--memory) is that of a process of its own for each way, beyond what stood before its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models are many times slower with more where others work too

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import RESULTS, markdown
from benchmarks.speed.counts import add_vgg
from benchmarks.speed.lam import make_backbone
from benchmarks.speed.measure import environment, medians, peak_mb, ranges, ratios
from benchmarks.speed.overhead_hosts import Host, build
from lara_adapter import LatentAction, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.storage.files import read_json, write_json

RESULT = RESULTS / "step_overhead.json"
WAYS = ("alone", "idle", "tap", "projector", "frozen", "joint", "joint/4", "cached", "cached/4", "detached")
LATENT = (8, 32)


class FreeLam(nn.Module):
    """A LAM that costs nothing: one latent for every pair."""

    latent_width = LATENT[0] * LATENT[1]
    draws_random_numbers = False

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(LATENT))

    def encode(self, present: Tensor, future: Tensor) -> Any:
        """[B, N, D] for B pairs."""
        latent = self.latent.expand(len(present), *LATENT)
        return LatentAction(latent, latent, torch.zeros(len(present), LATENT[0], dtype=torch.long))

    def forward(self, present: Tensor, future: Tensor, valid: Tensor | None = None) -> Any:
        """Its latent, and a loss of zero."""
        return SimpleNamespace(loss=0.0 * self.latent.sum(), latent=self.encode(present, future))


class Slice(nn.Module):
    """A projector that costs nothing: the first numbers of the hidden state, zeros where it has fewer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, D] -> [B, 256]."""
        width = LATENT[0] * LATENT[1]
        if hidden.shape[-1] < width:
            return nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
        return hidden[..., :width]


class Lams:
    """The LAMs of the ways, made once."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.preset, self.device, self.folder = arguments.lam, arguments.device, folder
        self.perceptual = arguments.perceptual
        self._made: dict[str, nn.Module] = {}

    def get(self, way: str) -> nn.Module:
        """The LAM of a way; joint and frozen share one, cached ones have a cache of their own."""
        kind = {"tap": "free", "projector": "free", "cached": "cached", "cached/4": "cached"}.get(way, "real")
        if kind not in self._made:
            torch.manual_seed(1)
            self._made[kind] = FreeLam() if kind == "free" else self._real()
            if kind == "cached":
                self._made[kind].cache_features(self.folder)  # type: ignore[operator]
            self._made[kind].to(self.device)
        return self._made[kind]

    def _real(self) -> LatentActionModel:
        if self.preset == "tiny":
            return LatentActionModel(LatentActionConfig.tiny())
        lam = LatentActionModel(LatentActionConfig.paper(perceptual_weight=0.0), backbone=make_backbone("paper"))
        if self.perceptual:
            add_vgg(lam)
        return lam


@contextlib.contextmanager
def attached(host: Host, way: str, lams: Lams) -> Iterator[None]:
    """LARA attached in one of the ways; detached again at the end."""
    if way in ("alone", "detached"):
        yield
        return
    settings: dict[str, Any] = {"layer": host.layer}
    if way == "idle":
        settings |= {"align_weight": 0.0, "lam_weight": 0.0}
    if way == "tap":
        settings["projector"] = Slice()
    if way == "frozen":
        settings["train_lam"] = False
    if way.endswith("/4"):
        settings["reconstruct"] = 0.25
    lara = attach_lara(host.policy, lams.get(way), **settings)
    try:
        yield
    finally:
        lara.detach()


def scalar_loss(output: Any) -> Tensor:
    """The scalar that a loop would call backward on."""
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        output = output["loss"]
    return output.mean()


def timed_step(host: Host, inputs: Any, arguments: argparse.Namespace) -> float:
    """Seconds of one forward and backward: by the clock on a GPU, of the processor's own time on a CPU."""
    kind = arguments.device.partition(":")[0]
    wait: Callable[[], None] = torch.cuda.synchronize if kind == "cuda" else lambda: None
    clock = (
        time.perf_counter if kind == "cuda" else time.process_time
    )  # what else a shared machine does counts for nothing
    host.policy.zero_grad(set_to_none=True)
    wait()
    start = clock()
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
        loss = scalar_loss(host.policy(inputs))
    loss.backward()
    wait()
    return clock() - start


def to_device(value: Any, device: str) -> Any:
    """A batch on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Host, Lams, Any, Any]:
    """Host, LAMs, a batch with frames and the same without."""
    host = build(arguments.host)
    host.policy.to(arguments.device)
    size = arguments.frame_size or (224 if arguments.lam == "paper" else 64)
    frames = torch.randint(0, 256, (arguments.batch, arguments.views, 2, 3, size, size), dtype=torch.uint8)
    torch.manual_seed(2)
    with_frames = host.inputs(arguments.batch, frames)
    torch.manual_seed(2)
    alone = host.inputs(arguments.batch, None)
    return host, Lams(arguments, folder), *(to_device(x, arguments.device) for x in (with_frames, alone))


def selected_ways(arguments: argparse.Namespace) -> list[str]:
    """The selected ways; a cache only where the LAM has a frozen image encoder."""
    possible = [way for way in WAYS if not way.startswith("cached") or arguments.lam == "paper"]
    return [way for way in possible if way == "alone" or way in arguments.ways]


class Measured(NamedTuple):
    """What is known after a round.

    ratio: per way, each round's ratio to the policy alone.
    gflop: per way, of a step; empty unless they were counted.
    size: the policy's.
    """

    ratio: dict[str, list[float]]
    gflop: dict[str, float]
    size: str


def measure_time(arguments: argparse.Namespace) -> Iterator[Measured]:
    """What is known, after every round."""
    seconds: dict[str, list[float]] = {way: [] for way in selected_ways(arguments)}
    gflop: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        host, lams, with_frames, alone = prepare(arguments, Path(folder))
        inputs_of = {way: alone if way in ("alone", "detached") else with_frames for way in seconds}
        if not arguments.warmup and not arguments.compile:
            gflop = {way: count_step(host, way, lams, inputs, arguments) for way, inputs in inputs_of.items()}
        for round_ in range(arguments.rounds):
            ways = list(seconds)
            if round_ % 2:  # "detached" has to come after something was attached
                ways.sort(key=lambda way: (way == "detached", -WAYS.index(way)))
            for way in ways:
                inputs = inputs_of[way]
                with attached(host, way, lams):
                    if arguments.compile:
                        torch._dynamo.reset()
                        host.policy.compile()
                    for _ in range(arguments.warmup if not arguments.compile else 2 + arguments.warmup):
                        timed_step(host, inputs, arguments)
                    seconds[way].append(median(timed_step(host, inputs, arguments) for _ in range(arguments.steps)))
                    if arguments.compile:
                        host.policy._compiled_call_impl = None
            yield Measured(ratios(seconds, "alone"), gflop, host.size)


def count_step(host: Host, way: str, lams: Lams, inputs: Any, arguments: argparse.Namespace) -> float:
    """GFLOP of a step by torch's counter; a cache is filled before."""
    with attached(host, way, lams):
        if way == "cached":
            timed_step(host, inputs, arguments)
        with FlopCounterMode(display=False) as counter:
            timed_step(host, inputs, arguments)
    return round(counter.get_total_flops() / 1e9, 3)


def measure_memory(arguments: argparse.Namespace, way: str) -> float:
    """Peak MB of one way beyond what stood before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        host, lams, with_frames, alone = prepare(arguments, Path(folder))
        inputs = alone if way == "alone" else with_frames
        with attached(host, way, lams):
            return peak_mb(lambda: timed_step(host, inputs, arguments), arguments.device)


def measure_peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak MB of each way, in a process of its own; a way that runs out of memory is reported and left out."""
    peaks = {}
    for way in (way for way in selected_ways(arguments) if way not in ("idle", "tap", "projector", "detached")):
        command = [sys.executable, "-m", "benchmarks.speed.step_overhead", "--measure-memory", way, *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(f"no peak memory of {way!r}: exit status {done.returncode}\n{done.stderr[-2000:]}")
            continue
        peaks[way] = float(done.stdout.split()[-1])
    return peaks


def row_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a row is a row of."""
    return {
        "host": arguments.host, "lam": arguments.lam + " with LPIPS" * arguments.perceptual, "batch": arguments.batch,
        "views": arguments.views, "dtype": arguments.dtype, "compile": arguments.compile,
        "device": arguments.device.partition(":")[0],
    }  # fmt: skip


def measure_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything that is recorded of a run, after every round: a run that is cut short leaves what it has."""
    peak = measure_peaks(arguments) if arguments.memory else {}  # first: this process is still small
    for done, measured in enumerate(measure_time(arguments), 1):
        yield {
            "settings": row_settings(arguments),
            "policy_parameters": measured.size,
            "ratio": medians(measured.ratio),
            "range": ranges(measured.ratio),
            "gflop": measured.gflop,
            "rounds": done, "steps": arguments.steps, "threads": torch.get_num_threads(),
            "peak_mb": peak,
            "environment": environment(arguments.device, ("torch", "transformers")),
        }  # fmt: skip


def record(row: dict[str, Any], path: Path) -> None:
    """Put a row into the file, in the place of an earlier one of the same settings."""
    rows = read_json(path)["rows"] if path.exists() else []
    rows = [other for other in rows if other["settings"] != row["settings"]]
    write_json(path, {"rows": sorted([*rows, row], key=_place)})


def _place(row: dict[str, Any]) -> list[str]:
    """Where a row stands in the table: by host first."""
    return [str(row["settings"][key]) for key in ("host", "lam", "device", "dtype", "compile", "batch", "views")]


def with_memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The recorded row of these settings with its peak memory measured; nothing if it is not recorded."""
    rows = read_json(arguments.out)["rows"] if arguments.out.exists() else []
    row = next((row for row in rows if row["settings"] == row_settings(arguments)), None)
    if row is not None:
        arguments.ways = [way for way in row["ratio"] if way != "alone"]
        row["peak_mb"] = measure_peaks(arguments)
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: time of a step, relative to the policy alone."""
    ways = [way for way in WAYS if way != "alone" and any(way in row["ratio"] for row in rows)]
    lines = []
    for row in rows:
        s, peak = row["settings"], row["peak_mb"]
        cells = [f"{row['ratio'][way]:.2f}" if way in row["ratio"] else "" for way in ways]
        memory = f"{peak['joint'] / peak['alone']:.2f}" if {"joint", "alone"} <= peak.keys() else ""
        name = f"{s['host']} ({row['policy_parameters']}{', compiled' if s['compile'] else ''})"
        if s["device"] != "cpu":
            name += f", {row['environment']['machine']}"
        head = [name, s["lam"], f"{s['batch']} x {s['views']}", s["dtype"]]
        lines.append([*head, *cells, memory])
    return markdown.table(["policy", "LAM", "batch x views", "precision", *ways, "peak memory, joint"], lines)


def recorded() -> list[dict[str, Any]]:
    """The committed rows."""
    return read_json(RESULT)["rows"]


def section() -> str:
    """The committed rows and their reading."""
    rows = recorded()
    tiny = [row["ratio"]["tap"] for row in rows if row["settings"]["host"].startswith("lerobot:")]
    detached = [row["ratio"]["detached"] for row in rows]
    large = {
        row["settings"]["host"]: row["peak_mb"] for row in rows if row["settings"]["lam"] == "paper" and row["peak_mb"]
    }
    more = sorted((peak["joint"] - peak["alone"]) / 1e3 for peak in large.values())
    smolvla = large["lerobot-full:smolvla"]["alone"] / 1e3
    reading = markdown.paragraph(
        f"""What the columns say: the hooks, the token and the cosine (tap) are some fifty small operations a step,
        a fixed cost whatever the size of the policy. Of the demo's step they are a few per cent; of LeRobot's
        policies at these tiny sizes (their real classes, batch 8) {100 * (min(tiny) - 1):.0f} to
        {100 * (max(tiny) - 1):.0f} %, because those steps take milliseconds. At full size they are within the noise
        of the measurement: GR00T N1.6's action head (32 blocks of width 1536, horizon 50, behind a stand-in VLM),
        and LeRobot's SmolVLA (512 pixels, its VLM frozen), multi-task DiT and X-VLA (behind a stand-in Florence-2)
        at LeRobot's defaults (`lerobot-full`, random weights, three rounds of one step). There the LAM of the
        paper's size is what counts: it trains 121 M parameters beside a frozen ViT-MAE-large. How much depends on
        the policy's own step; a real VLM, which LARA does not touch, makes the ratio smaller than a stand-in does.
        pi0.5 at full size does not fit this machine's memory in float32. Peak memory holds the gradients, and is
        beyond the weights: the LAM of the paper's size adds {more[0]:.1f} to {more[-1]:.1f} GB, of which its own
        gradients are 0.5. To SmolVLA that is much, because its step alone takes {smolvla:.1f} GB: its VLM is frozen,
        with neither gradients nor activations that are kept. bfloat16 and `torch.compile` (four rounds) change
        little of the demo's ratios, on a CPU. On a GPU nothing was measured. How noisy it is: detached is the policy
        alone once more, and came out between
        {min(detached):.2f} and {max(detached):.2f}."""
    )
    return f"{table(rows)}\n\n{reading}\n\n{goals()}"


GOALS = {"tap": 1.01, "joint": 1.25, "cached": 1.10}


def whole_policy() -> dict[str, Any] | None:
    """The committed row of GR00T behind a VLM's cost."""
    return next((row for row in recorded() if row["settings"]["host"] == "gr00t"), None)


def goals() -> str:
    """What was aimed at, on a policy of GR00T N1.6's cost, and what was reached."""
    row = whole_policy()
    if row is None:
        return "GR00T N1.6 behind a VLM's cost (`--host gr00t`): not timed yet."
    timed, work = row["ratio"], row["gflop"]
    samples, (low, high) = row["settings"]["batch"], row["range"]["joint"]

    def reached(way: str) -> str:
        return "reached" if round(timed[way], 2) <= GOALS[way] else "not reached"

    def operations(way: str) -> str:
        return f"{work[way] / work['alone']:.2f}"

    return markdown.paragraph(
        f"""**A policy of GR00T N1.6's cost** (`gr00t`: its action head behind frozen matrix products in the place of its
        VLM, {work["alone"] / samples:,.0f} GFLOP a sample; the paper's LAM with the work of LPIPS adds
        {(work["joint"] - work["alone"]) / samples:,.0f}). Goals: the hooks {GOALS["tap"]:.2f}, measured {timed["tap"]:.2f}
        ({reached("tap")}); LARA {GOALS["joint"]:.2f}, measured {timed["joint"]:.2f} ({reached("joint")}), by operations
        {operations("joint")}; with the feature cache {GOALS["cached"]:.2f}, measured {timed["cached"]:.2f}
        ({reached("cached")}), by operations {operations("cached")}. With `reconstruct=0.25` {timed["joint/4"]:.2f} and
        {timed["cached/4"]:.2f}, by operations {operations("joint/4")} and {operations("cached/4")}. Medians of
        {row["rounds"]} rounds, of which LARA's were {low:.2f} to {high:.2f}; detached, the policy alone once more,
        {timed["detached"]:.2f}."""
    )


def gr00t_cost() -> str:
    """What a step of GR00T costs, for the page of the host."""
    row = whole_policy()
    if row is None:
        return "The time of a step is not measured yet."
    timed = {way: f"{row['ratio'][way]:.2f}" for way in ("joint", "joint/4", "cached/4")}
    return markdown.paragraph(
        f"""On a CPU, a step of its head behind a VLM's cost takes [{timed["joint"]} times as
        long](../../benchmarks/README.md#what-lara-adds-to-a-training-step) with the paper's LAM as without,
        {timed["joint/4"]} with `--lara.reconstruct 0.25`, {timed["cached/4"]} with the feature cache too."""
    )


SECTIONS = {"benchmarks/README.md": {"overhead": section}, "docs/hosts/gr00t.md": {"step cost": gr00t_cost}}


def problems() -> Iterator[str]:
    """Rows in which something is left after detach()."""
    rows = recorded()
    for row in rows:
        low, high = row["range"]["detached"]
        if low >= 1.02 or high <= 0.98:
            yield f"{RESULT.name}: {row['settings']}: detached is {low:.2f} to {high:.2f} of the policy alone"
    if abs(sum(row["ratio"]["detached"] for row in rows) / len(rows) - 1) >= 0.02:
        yield f"{RESULT.name}: detached is not the policy alone, in the mean over rows"


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="demo")
    parser.add_argument("--lam", choices=["tiny", "paper"], default="tiny")
    parser.add_argument("--perceptual", action="store_true", help="the paper's LAM with the work of LPIPS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--frame-size", type=int, help="of the frames, in pixels; default: the LAM's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="timed, per way and round; their median counts")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="which are measured, beside the policy alone"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--memory-only", action="store_true", help="into the recorded row of the same settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    parser.add_argument("--measure-memory", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_json(arguments.out)["rows"]))
        return 0
    if arguments.measure_memory:
        print(measure_memory(arguments, arguments.measure_memory))
        return 0
    row = None
    for row in with_memory(arguments) if arguments.memory_only else measure_rows(arguments):
        record(row, arguments.out)
    if row is None:
        sys.stderr.write(
            f"{arguments.out} has no row of {row_settings(arguments)}: time it first, without --memory-only\n"
        )
        return 1
    print(table([row]))
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
