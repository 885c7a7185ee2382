"""Everything that waits for a GPU, in one run of under six minutes, with nothing to download.

    python -m benchmarks.gpu                       # one CUDA device; rows in benchmarks/results/gpu.jsonl
    python -m benchmarks.gpu --device cpu --tiny   # the same code at toy sizes, in under a minute

A row is written as soon as it is known, so that a run that is cut loses nothing; a part that fails or whose package is
missing is a row that says so. Parts in this order: the training setups that need CUDA; a training step with LARA in each
way (bfloat16; medians of rounds in turn, against the policy alone in the same round) and its peak memory; a LAM's step by
part; LAM training alone. Weights are random. `gr00t-head` is a stand-in of GR00T N1.6's sizes: an action head of 32
blocks of width 1536 behind frozen matrices that cost what its VLM costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.speed.counts import add_vgg
from benchmarks.speed.lam import make_backbone
from benchmarks.speed.measure import environment, medians, peak_mb, ranges, ratios, take_turns
from benchmarks.speed.overhead_hosts import Host, build
from benchmarks.speed.step_overhead import FreeLam, Slice, scalar_loss, to_device
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara

WAYS: dict[str, dict[str, Any]] = {
    "alone": {}, "idle": {"align_weight": 0.0, "lam_weight": 0.0}, "tap": {"projector": Slice()},
    "frozen": {"train_lam": False}, "joint": {}, "joint, reconstruct=0.25": {"reconstruct": 0.25},
    "cached": {}, "cached, reconstruct=0.25": {"reconstruct": 0.25},
}  # fmt: skip


class Block(nn.Module):
    """Cross-attention to the VLM's tokens or self-attention, and an MLP, as GR00T's DiT alternates them."""

    def __init__(self, width: int, heads: int, context: int | None) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.crosses = context is not None

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """[B, S, W]."""
        query = self.norm(tokens)
        key = context if self.crosses else query
        tokens = tokens + self.attention(query, key, key, need_weights=False)[0]
        return tokens + self.mlp(self.mlp_norm(tokens))


class Head(nn.Module):
    """An action head behind a frozen stand-in for a VLM; flow matching, a dict loss."""

    def __init__(self, depth: int, width: int, context: int, vlm_layers: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.context = tokens, context
        self.vlm = nn.Sequential(
            *(nn.Sequential(nn.Linear(context, 8 * context), nn.GELU(), nn.Linear(8 * context, context))
              for _ in range(vlm_layers))
        ).requires_grad_(False)  # fmt: skip
        self.action_in, self.action_out = nn.Linear(33, width), nn.Linear(width, 32)
        self.transformer_blocks = nn.ModuleList(
            Block(width, max(1, width // 48), None if number % 2 else context) for number in range(depth)
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch."""
        action = batch["action"]
        noise, at = torch.randn_like(action), torch.rand(len(action), 1, 1, device=action.device)
        with torch.no_grad():
            dtype = self.vlm[0][0].weight.dtype  # type: ignore[index, union-attr]
            seen = self.vlm(torch.randn(len(action), self.tokens, self.context, device=action.device, dtype=dtype))
        state = self.action_in(torch.cat([at * action + (1 - at) * noise, at.expand(*action.shape[:2], 1)], dim=-1))
        for block in self.transformer_blocks:
            state = block(state, seen)
        return {"loss": (self.action_out(state) - (action - noise)).square().mean()}


def make_head(tiny: bool) -> Host:
    """The stand-in for GR00T N1.6."""
    torch.manual_seed(0)
    policy = Head(3, 48, 16, 1, 8) if tiny else Head(32, 1536, 2048, 36, 300)

    def inputs(size: int, frames: Tensor | None) -> dict[str, Tensor]:
        batch = {"action": torch.randn(size, 50, 32)}
        return batch if frames is None else {**batch, "lara_frames": frames}

    policy.vlm.to(torch.bfloat16)
    return Host(policy.train(), inputs)


def make_lam(tiny: bool, perceptual: bool = True) -> LatentActionModel:
    """The paper's LAM with random weights and VGG16's work in the place of LPIPS; tiny: with a small frozen encoder."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {}
    if tiny:
        sizes = {"image_size": 32, "idm_width": 24, "idm_layers": 1, "idm_heads": 2, "idm_mlp": 48, "fdm_width": 24,
                 "fdm_layers": 1, "fdm_heads": 2, "fdm_mlp": 48, "fdm_patch_size": 8, "encoder_patch_size": 8,
                 "encoder_width": 32}  # fmt: skip
    config = LatentActionConfig.paper(perceptual_weight=0.0, **sizes)
    lam = LatentActionModel(config, backbone=_tiny_backbone() if tiny else make_backbone("paper"))
    if perceptual and not tiny:
        add_vgg(lam)
    return lam


def _tiny_backbone() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    return ViTMAEModel(ViTMAEConfig(**sizes, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                                    decoder_num_attention_heads=2, decoder_intermediate_size=16))  # fmt: skip


class Run:
    """One run: where it measures, and the file that its rows go to."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, self.tiny, self.out = given.device, given.tiny, given.out
        self.kind = given.device.partition(":")[0]
        self.end = time.monotonic() + given.seconds
        self.rounds = 2 if given.tiny else 5
        self.about = environment(given.device, ("torch", "transformers"))
        self.failed = 0

    def part(self, name: str, work: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Write the rows of a part as they come; what goes wrong is a row."""
        if time.monotonic() > self.end:
            self.write(name, {"skipped": "no time was left"})
            return
        try:
            for row in work():
                self.write(name, row)
        except ImportError as error:
            self.write(name, {"skipped": str(error)})
        except Exception as error:  # the other parts still run
            self.failed += 1
            self.write(name, {"failed": f"{type(error).__name__}: {error}"[:500]})
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to the file."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": name, **row, "environment": self.about}) + "\n")
        print(f"{name}: {json.dumps(row)}", flush=True)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call, by the clock, when the device is done."""
        wait: Callable[[], Any] = torch.cuda.synchronize if self.kind == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start

    def narrow(self) -> torch.autocast:
        """bfloat16 autocast."""
        return torch.autocast(self.kind, torch.bfloat16)

    def setups(self) -> Iterator[dict[str, Any]]:
        """The cases of benchmarks.setups.gpu in one process."""
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        only = ["--only", "ddp"] if self.tiny else []
        command = [sys.executable, "-m", "benchmarks.setups.gpu", "--device", self.kind, *only]
        left = max(30.0, self.end - time.monotonic())
        done = subprocess.run(
            command, env={**os.environ, **alone}, capture_output=True, text=True, check=False, timeout=left
        )
        found = [line.rsplit(None, 1) for line in done.stdout.splitlines() if line.startswith("gpu:")]
        for case, state in found:
            yield {"case": case.strip(), "state": state}
        if not found or done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-400:]}")

    def steps(self, name: str, batch: int) -> Iterator[dict[str, Any]]:
        """A policy's training step with LARA in each way over the policy alone, and peak memory."""
        host = make_head(self.tiny) if name == "gr00t-head" else build(name)
        host.policy.to(self.device)
        lam, free = make_lam(self.tiny).to(self.device), FreeLam().to(self.device)
        blocks = "transformer_blocks" if name == "gr00t-head" else None
        side = lam.config.image_size
        frames = torch.randint(0, 256, (batch, 1, 2, 3, side, side), dtype=torch.uint8)
        inputs, alone = (to_device(host.inputs(batch, each), self.device) for each in (frames, None))

        def step(way: str) -> None:
            host.policy.zero_grad(set_to_none=True)
            with self.narrow():
                loss = scalar_loss(host.policy(alone if way == "alone" else inputs))
            loss.backward()

        @contextlib.contextmanager
        def attached(way: str) -> Iterator[None]:
            if way == "alone":
                yield
                return
            lam.cache_features(folder if way.startswith("cached") else None)
            lara = attach_lara(host.policy, free if way == "tap" else lam, host.layer, blocks=blocks, **WAYS[way])
            try:
                yield
            finally:
                lara.detach()

        def timed(way: str) -> float:
            with attached(way):
                step(way)
                return median(self.seconds(lambda: step(way)) for _ in range(1 if self.tiny else 5))

        def peak(way: str) -> float:
            with attached(way):
                step(way)
                host.policy.zero_grad(set_to_none=True)
                lam.zero_grad(set_to_none=True)
                return peak_mb(lambda: step(way), self.device)

        with tempfile.TemporaryDirectory() as folder:
            found = take_turns({way: lambda way=way: timed(way) for way in WAYS}, self.rounds)  # type: ignore[misc]
            relative = ratios(found, "alone")
            yield {"policy": name, "batch": batch, "ratio": medians(relative), "range": ranges(relative),
                   "seconds_alone": median(found["alone"])}  # fmt: skip
            yield {"policy": name, "batch": batch, "peak_mb": {way: round(peak(way), 1) for way in WAYS}}

    def lam_parts(self) -> Iterator[dict[str, Any]]:
        """Forward, or forward and backward, of each part of a LAM."""
        batch = 2 if self.tiny else 16
        lam = make_lam(self.tiny).to(self.device).train()
        config = lam.config
        frames = torch.rand(batch, 3, config.image_size, config.image_size, device=self.device)
        tokens = torch.randn(batch, config.encoder_tokens, config.encoder_width, device=self.device)
        z = torch.randn(batch, *lam.latent_shape, device=self.device, requires_grad=True)
        pixels = frames.clone().requires_grad_()
        parts: dict[str, Callable[[], Any]] = {
            "image encoder": lambda: lam.image_encoder(torch.cat([frames, frames])),
            "inverse dynamics": lambda: lam.inverse_dynamics(tokens, tokens)[0].sum().backward(),
            "quantizer": lambda: lam.quantizer(z, want_terms=True)[2].backward(),
            "forward dynamics": lambda: lam.forward_dynamics(frames, z).sum().backward(),
            "whole": lambda: lam(frames, frames).loss.backward(),
        }
        if lam.perceptual is not None:
            perceptual = lam.perceptual
            parts["LPIPS"] = lambda: perceptual(pixels, frames).sum().backward()
        for name, work in parts.items():
            for precision in ("float32", "bfloat16"):
                with self.narrow() if precision == "bfloat16" else contextlib.nullcontext():
                    work()
                    taken = [self.seconds(work) for _ in range(self.rounds)]
                yield {"step": name, "batch": batch, "precision": precision, "seconds": median(taken)}

    def lam_training(self) -> Iterator[dict[str, Any]]:
        """Pairs a second of a LAM's optimiser steps on frames that are there: what train-lam does, without decoding."""
        batch = 2 if self.tiny else 64
        for settings in ({}, {"reconstruct": 0.25}, {"checkpointing": True}, {"narrow": True}):
            lam = make_lam(self.tiny).to(self.device).train()
            lam.checkpoint_layers("checkpointing" in settings)
            if "narrow" in settings:
                lam.narrow_encoder()
            part = {"reconstruct": settings.get("reconstruct", 1.0)}
            optimizer = torch.optim.AdamW(lam.parameters(), fused=self.kind == "cuda")
            side = lam.config.image_size
            pair = torch.randint(0, 256, (2, batch, 3, side, side), dtype=torch.uint8, device=self.device)

            def step() -> None:
                with self.narrow():
                    loss = lam(*pair, **part).loss  # noqa: B023
                loss.backward()
                optimizer.step()  # noqa: B023
                optimizer.zero_grad(set_to_none=True)  # noqa: B023

            step()
            peak = peak_mb(step, self.device)
            taken = median(self.seconds(step) for _ in range(self.rounds))
            yield {"settings": settings, "batch": batch, "pairs_per_second": batch / taken, "peak_mb": round(peak, 1)}


def main() -> int:
    """Run all parts; exit status 1 if one failed, 2 without the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: that everything runs, not how fast")
    parser.add_argument("--seconds", type=float, default=330, help="no part begins after that")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU; --device cpu --tiny runs the same code at toy sizes")
        return 2
    run = Run(given)
    batches = (2,) if given.tiny else (16, 64)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"setups": run.setups}
    for batch in batches:
        parts[f"step: gr00t-head, batch {batch}"] = lambda batch=batch: run.steps("gr00t-head", batch)  # type: ignore[misc]
    parts |= {"LAM by part": run.lam_parts, "LAM training": run.lam_training}
    for batch in () if given.tiny else batches:
        name = "lerobot-full:smolvla"
        parts[f"step: {name}, batch {batch}"] = lambda batch=batch, name=name: run.steps(name, batch)  # type: ignore[misc]
    for name, work in parts.items():
        if given.only in name:
            run.part(name, work)
    return int(run.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
