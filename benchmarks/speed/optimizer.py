"""The optimizer's share of what LARA costs: AdamW over LARA's parameters as torch makes it by default, foreach and fused.

    python -m benchmarks.speed.optimizer            # the paper's LAM and an MLP projector; two minutes, 6 GB; --tiny

The three update the same parameters from the same gradients, in turn and in reverse; reported are medians of the rounds'
ratios to the default, and calls of torch's kernels in one update (on a GPU a loop over tensors launches each of them). The
share is that of a joint step's LARA part at a batch of one pair: forward and backward of the LAM, float32, LPIPS left out.
On a CPU it is processor time, of one thread unless OMP_NUM_THREADS says otherwise. On a CPU the default is the loop, on a
GPU it is foreach.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from benchmarks import RESULTS, markdown
from benchmarks.speed.counts import count
from benchmarks.speed.lam import make_backbone, make_frames
from benchmarks.speed.measure import environment, finish, medians, ranges, ratios, take_turns
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import read_json

RESULT = RESULTS / "optimizer_speed.json"
KINDS: dict[str, dict[str, Any]] = {
    "default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}
}  # fmt: skip
HIDDEN = 1536  # width of GR00T's DiT


def make_parts(tiny: bool, device: str) -> tuple[LatentActionModel, nn.Module]:
    """A LAM and the projector into its latent."""
    torch.manual_seed(0)
    if tiny:
        lam = LatentActionModel(LatentActionConfig.tiny())
    else:
        lam = LatentActionModel(LatentActionConfig.paper(perceptual_weight=0.0), backbone=make_backbone("paper"))
    projector = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.SiLU(), nn.Linear(2 * HIDDEN, lam.latent_width))
    return lam.train().to(device), projector.to(device)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds: by the clock on a GPU, of the processor's own time on a CPU."""
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def make_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is written."""
    device = arguments.device
    lam, projector = make_parts(arguments.tiny, device)
    pair = make_frames(lam, 1, device)

    def step() -> None:
        lam.zero_grad(set_to_none=True)
        lam(*pair).loss.backward()

    step()
    part = sorted(timed(step, device) for _ in range(arguments.steps))[arguments.steps // 2]
    parameters = [p for module in (lam, projector) for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizers = {kind: torch.optim.AdamW(parameters, lr=1e-6, **options) for kind, options in KINDS.items()}
    for optimizer in optimizers.values():
        optimizer.step()  # makes its state
    calls = {kind: count(optimizer.step)[0].operations for kind, optimizer in optimizers.items()}
    seconds = take_turns({kind: partial(timed, o.step, device) for kind, o in optimizers.items()}, arguments.rounds)
    relative = ratios(seconds, "default")
    return {
        "ratio": medians(relative),
        "ratio_range": ranges(relative),
        "calls": calls,
        "share_of_one_pair": {kind: value / part for kind, value in medians(seconds).items()},
        "parameters": sum(p.numel() for p in parameters),
        "tensors": len(parameters),
        "settings": {
            "tiny": arguments.tiny, "device": device.partition(":")[0], "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
        },
        "environment": environment(device),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rows = []
    for kind in (kind for kind in KINDS if kind != "default"):
        low, high = report["ratio_range"][kind]
        rows.append((
            f"`{next(iter(KINDS[kind]))}={next(iter(KINDS[kind].values()))}`",
            markdown.spread(report["ratio"][kind], low, high), str(report["calls"][kind]),
            f"{report['share_of_one_pair'][kind]:.1%}",
        ))  # fmt: skip
    head = ("AdamW", "an update, over the default", "calls of kernels", "over the LAM's step of one pair")
    return markdown.table(head, rows)


def section() -> str:
    """The committed record and what it recommends."""
    if not RESULT.exists():
        return "Not timed yet."
    report = read_json(RESULT)
    calls, share, ratio = report["calls"], report["share_of_one_pair"], report["ratio"]
    cpu = report["settings"]["device"] == "cpu"
    best = min(("foreach", "fused"), key=lambda kind: ratio[kind])
    worth = (
        f"`{best}=True` takes {ratio[best]:.2f} of the default's time"
        if ratio[best] < 0.95
        else "neither is faster than the default"
    )
    where = "processor time on a CPU; not measured on a GPU" if cpu else report["environment"]["machine"]
    advice = markdown.paragraph(
        f"""{report["parameters"] / 1e6:.0f} M parameters in {report["tensors"]} tensors, float32,
        {report["settings"]["rounds"]} rounds, {where}. Here {worth}. An update costs the same whatever the batch: at 16
        pairs it is {share["default"] / 16:.1%} of the LAM's part of a step. It reads and writes every weight, gradient and
        moment; what else there is to gain is calls, {calls["loop"]} in a loop, {calls["foreach"]} with foreach,
        {calls["fused"]} fused, which count on a GPU. So give the host's optimizer `fused=True` (`--optim
        adamw_torch_fused` in transformers' Trainer); LARA's parameters are in it like all others. `lara
        train-lam` does so itself."""
    )
    return f"{table(report)}\n\n{advice}"


SECTIONS = {"docs/latent-action-models.md": {"optimizer": section}}


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of the LAM, whose median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    report = make_report(arguments)
    return finish(report, table(report), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
