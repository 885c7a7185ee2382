"""The policy of the golden adapters; like them it never changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Policy(nn.Module):
    """Four blocks over the action tokens; draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.action_in = nn.Linear(3, 16)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(4))
        self.action_out = nn.Linear(16, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = self.action_in(0.5 * batch["action"])
        for block in self.transformer_blocks:
            x = block(x)
        return {"loss": (self.action_out(x) - batch["action"]).square().mean()}


def batch() -> dict[str, torch.Tensor]:
    """Made by arithmetic: random numbers may differ from version to version."""
    pixels = torch.arange(4 * 2 * 3 * 16 * 16)
    return {
        "action": torch.sin(torch.arange(4 * 6 * 3).float()).reshape(4, 6, 3),
        "lara_frames": (pixels * 7919 % 251).to(torch.uint8).reshape(4, 2, 3, 16, 16),
    }


def losses(policy: Any, lara: Any) -> dict[str, float]:
    """Of one training forward."""
    total = policy(batch())["loss"].item()
    return {"loss": total, "align": lara.losses.align.item(), "lam": lara.losses.lam.item(), "step": lara.step - 1}
