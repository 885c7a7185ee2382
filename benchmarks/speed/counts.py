"""What a training step does, in counts: a busy machine does not change them, and a test can hold them.

    python -m benchmarks.speed.counts               # tiny LAM on the demo's policy
    python -m benchmarks.speed.counts --lam paper   # the paper's LAM alone, part by part; two minutes, 10 GB
    python -m benchmarks.speed.counts --record      # the first, with one view and with four, into the record

An operation is a call of one of torch's kernels, about one launch on a GPU; views are none. Bytes are those of the results
that operations allocate. A synchronisation is a value that Python reads from a tensor: on a GPU it waits there. FLOP are
torch's own count: matrix products, convolutions and attention.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import RESULTS, markdown
from benchmarks.speed.lam import make_backbone
from benchmarks.speed.overhead_hosts import demo
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.storage.files import read_json, write_json

__all__ = ["Counts", "add_vgg", "count"]

RESULT = RESULTS / "counts.json"
_MOVES = {"_to_copy", "_unsafe_index_put", "cat", "clone", "constant_pad_nd", "copy_", "index", "index_add_", "index_put_",
          "index_select", "select_backward", "slice_backward", "stack"}  # fmt: skip
_READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # beside those that the dispatcher sees


class Counts(NamedTuple):
    """What some work did.

    operations: kernels called.
    moves: of these, those that only copy, cast or gather.
    allocated: bytes of the results that were allocated.
    synchronisations: values read by Python.
    flop: of matrix products, convolutions and attention.
    """

    operations: int
    moves: int
    allocated: int
    synchronisations: int
    flop: int


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocated = self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.read += name in ("_local_scalar_dense", "nonzero")
        if name != "_local_scalar_dense" and not func.is_view and not name.startswith(("sym_", "detach")):
            self.calls[name] += 1
            given, got = _storages((args, kwargs)), _storages(result)
            self.allocated += sum(size for storage, size in got.items() if storage not in given)
        return result


class _Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += func in _READS
        return func(*args, **(kwargs or {}))


def _storages(tree: Any) -> dict[int, int]:
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in found}


def count(work: Callable[[], Any]) -> tuple[Counts, Counter[str]]:
    """The counts of `work`, and how often it called each operation; it runs once, so warm up before."""
    with FlopCounterMode(display=False) as flop, _Reads() as reads, _Kernels() as kernels:
        work()
    calls = kernels.calls
    moves = sum(number for name, number in calls.items() if name in _MOVES)
    read = kernels.read + reads.read
    return Counts(sum(calls.values()), moves, kernels.allocated, read, flop.get_total_flops()), calls


def demo_steps(views: int = 1, batch: int = 8) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The demo's policy alone, and with LARA in one way after the other."""
    torch.manual_seed(0)
    host = demo()
    frames = torch.randint(0, 256, (batch, views, 2, 3, 64, 64), dtype=torch.uint8)
    inputs, alone = host.inputs(batch, frames), host.inputs(batch, None)

    def step(given: Any) -> None:
        host.policy.zero_grad(set_to_none=True)
        host.policy(given)["loss"].backward()

    yield "alone", lambda: step(alone)
    ways: dict[str, dict[str, Any]] = {
        "idle": {"align_weight": 0.0, "lam_weight": 0.0}, "frozen": {"train_lam": False}, "joint": {},
        "joint, contrastive": {"alignment": "contrastive"}, "joint, reconstruct=0.25": {"reconstruct": 0.25},
    }  # fmt: skip
    for way, settings in ways.items():
        lara = attach_lara(host.policy, LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=0)), **settings)
        yield way, lambda: step(inputs)
        lara.detach()


class VggDistance(nn.Module):
    """LPIPS's work with random weights and nothing to download: VGG16's convolutions on both images, differences."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers[:-1]).requires_grad_(False)

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Distance per sample [B]."""
        distance = torch.zeros(len(predicted), device=predicted.device)
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                distance = distance + (
                    nn.functional.normalize(predicted) - nn.functional.normalize(target)
                ).square().mean((1, 2, 3))
            predicted, target = layer(predicted), layer(target)
        return distance


def add_vgg(lam: LatentActionModel) -> None:
    """Let a LAM of the paper's size that was made without LPIPS do its work."""
    lam.perceptual, lam.config = VggDistance(), LatentActionConfig.paper()  # type: ignore[assignment]


def paper_steps(batch: int = 1) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A training step of the paper's LAM, whole and without some of its parts."""
    torch.manual_seed(0)
    lam = LatentActionModel(LatentActionConfig.paper(perceptual_weight=0.0), backbone=make_backbone("paper")).train()
    pair = [torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8) for _ in "tC"]
    valid = torch.ones(batch, dtype=torch.bool)

    def step(dtype: torch.dtype | None = None, **part: Any) -> None:
        lam.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = lam(*pair, valid, **part).loss
        loss.backward()

    yield "without LPIPS", step
    yield "without LPIPS, bfloat16", lambda: step(torch.bfloat16)
    yield "frozen: encode", lambda: lam.encode(*pair)
    tokens = lam.image_encoder(torch.zeros(2 * batch, 3, 224, 224))
    yield "image encoder", lambda: lam.image_encoder(torch.zeros(2 * batch, 3, 224, 224))
    lam.image_encoder.compute = lambda images: tokens
    yield "cached, without LPIPS", step
    add_vgg(lam)
    yield "cached", step


def measured(steps: Iterator[tuple[str, Callable[[], Any]]]) -> Iterator[tuple[str, Counts, Counter[str]]]:
    """Name, counts and operations of each step, once it is warm."""
    for name, work in steps:
        work()
        yield name, *count(work)


HEAD = ("step", "operations", "of these moves", "MB allocated", "synchronisations", "GFLOP")


def cells(name: str, found: Counts) -> list[str]:
    """A line of the table."""
    return [name, str(found.operations), str(found.moves), f"{found.allocated / 1e6:.1f}", str(found.synchronisations),
            f"{found.flop / 1e9:.2f}"]  # fmt: skip


def record() -> None:
    """Count the tiny LAM's steps with one view and with four."""
    steps = [
        {"step": name if views == 1 else f"{name}, {views} views", "counts": found._asdict()}
        for views in (1, 4)
        for name, found, _ in measured(demo_steps(views))
        if views == 1 or name not in ("alone", "idle")
    ]
    write_json(RESULT, {"torch": torch.__version__, "batch": 8, "steps": steps})


def section() -> str:
    """The record in Markdown."""
    return markdown.table(HEAD, [cells(row["step"], Counts(**row["counts"])) for row in read_json(RESULT)["steps"]])


SECTIONS = {"benchmarks/README.md": {"counts": section}}


def main() -> None:
    """Print a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lam", choices=["tiny", "paper"], default="tiny")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--batch", type=int, help="pairs; tiny: 8, paper: 1")
    parser.add_argument("--operations", action="store_true", help="also how often each operation is called")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    given = parser.parse_args()
    if given.record:
        record()
        print(section())
        return
    steps = demo_steps(given.views, given.batch or 8) if given.lam == "tiny" else paper_steps(given.batch or 1)
    print(markdown.table(HEAD, []))
    for name, found, calls in measured(steps):
        print(f"| {' | '.join(cells(name, found))} |", flush=True)
        if given.operations:
            print(", ".join(f"{operation} {number}" for operation, number in calls.most_common()))


if __name__ == "__main__":
    main()
