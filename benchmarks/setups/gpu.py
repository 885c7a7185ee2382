"""The training setups that need GPUs: NCCL DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3, inductor, bf16.

    torchrun --nproc-per-node 2 -m benchmarks.setups.gpu                      # two GPUs or more
    torchrun --nproc-per-node 2 -m benchmarks.setups.gpu --device cpu         # gloo; ZeRO is left out
    python -m benchmarks.setups.table                                         # puts the rows into the page

Each case trains the demo's policy with LARA (tiny LAM, contrastive) for a few steps and compares the gradients of the
first step with one process's on the same batches; ZeRO, which hides gradients, is compared by the weights after one
plain SGD step. Writes benchmarks/results/setups/gpu.json (or prints, with --device cpu).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import sys
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import distributed as dist
from torch import nn

from benchmarks import RESULTS
from examples.mini_vla import MiniVLA, MiniVLAConfig
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.storage.files import write_json

BATCH, STEPS = 8, 4


class FixedVLA(MiniVLA):
    """The demo's policy with the flow's noise and time drawn from the batch's own seed: comparable between setups."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As MiniVLA, noise drawn under a fixed seed."""
        devices = [batch["state"].device] if batch["state"].is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(batch["seed"][0]))
            return super().forward({k: v for k, v in batch.items() if k != "seed"})


def make_batch(seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random observations, actions and frames of the demo's shapes."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (BATCH, 2, 3, 64, 64), generator=g, dtype=torch.uint8)
    batch = {
        "image": frames[:, 0],
        "state": torch.randn(BATCH, 4, generator=g),
        "task": torch.randint(0, 2, (BATCH,), generator=g),
        "action": torch.randn(BATCH, 16, 4, generator=g).clamp(-1, 1),
        "action_mask": torch.ones(BATCH, 16, 4),
        "lara_frames": frames,
        "seed": torch.full((BATCH,), seed),
    }
    return {name: value.to(device) for name, value in batch.items()}


def build(device: torch.device) -> FixedVLA:
    """The policy with LARA attached, the same on every rank."""
    torch.manual_seed(0)
    policy = FixedVLA(MiniVLAConfig()).train()
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=2))
    # cosine: the contrastive loss of one process has other negatives than that of several ranks
    attach_lara(policy, lam, align_weight=0.1, lam_weight=0.1)
    return policy.to(device)


def reference(policy: FixedVLA, device: torch.device) -> dict[str, torch.Tensor]:
    """The mean over ranks of the gradients that each rank's batch gives in one process."""
    alone, initialised = copy.deepcopy(policy), dist.is_initialized
    world = dist.get_world_size() if dist.is_initialized() else 1
    try:
        dist.is_initialized = lambda: False  # the LAM's statistics too are one process's
        for rank in range(world):
            (alone(make_batch(rank, device))["loss"] / world).backward()
    finally:
        dist.is_initialized = initialised
    return {name: p.grad.clone() for name, p in alone.named_parameters() if p.grad is not None}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Fail with the worst name unless every gradient agrees relative to its norm."""
    assert found.keys() == expected.keys(), f"different parameters: {sorted(found.keys() ^ expected.keys())[:5]}"
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < tolerance, f"{name}: relative error {float(error):.2e}"


def train_on(step: Callable[[dict[str, torch.Tensor]], torch.Tensor], device: torch.device) -> None:
    """A few more steps on other batches, losses finite."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for number in range(STEPS):
        loss = step(make_batch(100 + 10 * number + rank, device))
        assert torch.isfinite(loss), f"loss {float(loss)} at step {number}"


def case_ddp(device: torch.device, **flags: bool) -> None:
    """DistributedDataParallel."""
    policy = build(device)
    expected = reference(policy, device)
    model = nn.parallel.DistributedDataParallel(policy, **flags)
    model(make_batch(dist.get_rank(), device))["loss"].backward()
    compare({n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, expected, 1e-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    train_on(step, device)
    check = torch.cat([p.detach().flatten() for p in policy.parameters()])
    total = check.clone()
    dist.all_reduce(total)
    assert torch.equal(total, check * dist.get_world_size()) or torch.allclose(total / dist.get_world_size(), check)


def case_fsdp(device: torch.device, units: bool) -> None:
    """FSDP2, LARA in the root's unit or in units of its own."""
    from torch.distributed.fsdp import fully_shard

    policy = build(device)
    expected = reference(policy, device)
    for block in policy.action_head.model.transformer_blocks:
        fully_shard(block)
    if units:
        for unit in policy.lara.fsdp_units():
            fully_shard(unit)
    fully_shard(policy)
    policy(make_batch(dist.get_rank(), device))["loss"].backward()
    found = {n: p.grad.full_tensor() for n, p in policy.named_parameters() if p.grad is not None}
    compare(found, expected, 1e-3)


def case_inductor(device: torch.device) -> None:
    """torch.compile with its default backend, one graph."""
    policy = build(device)
    alone, batch = copy.deepcopy(policy), make_batch(dist.get_rank(), device)
    alone(batch)["loss"].backward()
    expected = {n: p.grad.clone() for n, p in alone.named_parameters() if p.grad is not None}
    compiled = torch.compile(policy)
    with torch._inductor.config.patch(fallback_random=True):  # inductor draws other numbers than eager by default
        compiled(batch)["loss"].backward()
    compare({n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, expected, 1e-2)


def case_bf16(device: torch.device) -> None:
    """bf16 autocast: the terms stay float32 and close to the exact ones."""
    policy = build(device)
    exact = copy.deepcopy(policy)
    batch = make_batch(0, device)
    exact(batch)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        policy(batch)["loss"].backward()
    terms, expected = policy.lara.losses, exact.lara.losses
    assert terms.total.dtype == torch.float32
    assert torch.allclose(terms.align, expected.align, atol=0.05), (terms.align, expected.align)


def case_fp16(device: torch.device) -> None:
    """fp16 autocast with GradScaler: the scaled gradients are finite, and every parameter of LARA moves."""
    policy = build(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    before = {name: p.detach().clone() for name, p in policy.lara.projector.named_parameters()}
    for number in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = policy(make_batch(number, device))["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() >= 2.0**8, "steps were skipped: a gradient was not finite"
    assert all(not torch.equal(p, before[name]) for name, p in policy.lara.projector.named_parameters())


def case_zero(device: torch.device, stage: int) -> None:
    """DeepSpeed ZeRO: the weights after one plain SGD step are those of one process."""
    import deepspeed

    policy = build(device)
    expected, lr = reference(policy, device), 0.1
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    loss = engine(make_batch(dist.get_rank(), device))["loss"]
    engine.backward(loss)
    engine.step()
    found = {}
    for name, parameter in policy.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, enabled=stage == 3):
            found[name] = (start[name] - parameter.detach().clone()) / lr
    compare({name: found[name] for name in expected}, expected, 1e-2)
    train_on(lambda batch: _engine_step(engine, batch), device)


def _engine_step(engine: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = engine(batch)["loss"]
    engine.backward(loss)
    engine.step()
    return loss.detach()


def main() -> int:
    """Run every case on every rank and write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU; --device cpu runs the cases that need none")
        return 2
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=5))
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    cases: dict[str, Callable[[], None]] = {
        "gpu:ddp": lambda: case_ddp(device),
        "gpu:ddp find_unused": lambda: case_ddp(device, find_unused_parameters=True),
        "gpu:ddp static_graph": lambda: case_ddp(device, static_graph=True),
        "gpu:fsdp2 root": lambda: case_fsdp(device, False),
        "gpu:fsdp2 units": lambda: case_fsdp(device, True),
        "gpu:inductor": lambda: case_inductor(device),
        "gpu:bf16": lambda: case_bf16(device),
        "gpu:fp16 GradScaler": lambda: case_fp16(device),
    }
    if on_gpu:
        cases |= {"gpu:zero2": lambda: case_zero(device, 2), "gpu:zero3": lambda: case_zero(device, 3)}
    results: dict[str, str] = {}
    for name, case in cases.items():
        if arguments.only not in name:
            continue
        torch._dynamo.reset()
        try:
            case()
            state = "passed"
        except ImportError as error:
            state = "skipped"
            print(f"[{rank}] {name}: {error}")
        except Exception as error:  # go on with the next case
            state = "failed"
            print(f"[{rank}] {name}: {type(error).__name__}: {error}")
        worst = torch.tensor(["passed", "skipped", "failed"].index(state), device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        results[name] = ["passed", "skipped", "failed"][int(worst)]
        if rank == 0:
            print(f"{name:24} {results[name]}", flush=True)
    if rank == 0 and on_gpu:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["device"] = f"{dist.get_world_size()} x {torch.cuda.get_device_name(device)}"
        write_json(RESULTS / "setups" / "gpu.json", {"versions": versions, "results": results})
        print(json.dumps(results, indent=2))
    dist.destroy_process_group()
    return int("failed" in results.values())


if __name__ == "__main__":
    sys.exit(main())
