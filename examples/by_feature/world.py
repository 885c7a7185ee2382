"""What the examples share: a small policy, a small latent action model, and batches of random numbers.

Replace them by your own policy, your LAM (`LatentActionModel.from_pretrained("my-lam")`) and your data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.mini_vla import MiniVLA, MiniVLAConfig
from lara_adapter import LatentActionConfig, LatentActionModel

SIZE, HORIZON = 32, 8  # pixels, actions in a chunk


def new_policy() -> MiniVLA:
    """A flow-matching diffusion transformer with random weights."""
    return MiniVLA(MiniVLAConfig(action_dim=2, horizon=HORIZON, state_dim=2, num_tasks=1, image_size=SIZE, width=32))


def new_lam() -> LatentActionModel:
    """A latent action model that has not been trained."""
    return LatentActionModel(LatentActionConfig.tiny(image_size=SIZE))


def make_batch(rows: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """A batch with frames for LARA: the frame now, and the frame HORIZON steps later."""
    random = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (rows, 2, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)
    return {
        "image": frames[:, 0],
        "state": torch.rand(rows, 2, generator=random),
        "task": torch.zeros(rows, dtype=torch.long),
        "action": torch.rand(rows, HORIZON, 2, generator=random) * 2 - 1,
        "action_mask": torch.ones(rows, HORIZON, 2),
        "lara_frames": frames,
    }


def train(policy: nn.Module, steps: int) -> None:
    """A plain loop (own_loop.py shows it), where it is not what an example is about."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    policy.train()
    for step in range(steps):
        loss = policy(make_batch(seed=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_rows(count: int) -> list[dict[str, Tensor]]:
    """A dataset: samples without the batch dimension."""
    return [{name: value[0] for name, value in make_batch(1, seed).items()} for seed in range(count)]


def arguments(doc: str | None, argv: Sequence[str] | None, **more: str) -> argparse.Namespace:
    """Read `--steps`, `--output`, and further flags `name="help"`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/by_feature"), help="where something is saved")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    return parser.parse_args(argv)
