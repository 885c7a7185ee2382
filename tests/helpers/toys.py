"""Small policies in the shapes of real hosts, and a small latent action model of a user's own.

Each shape stands for a family: DitPolicy for GR00T (blocks are called, dict loss), BypassPolicy for pi0 (the host
walks through the parts of its layers and never calls them, unreduced loss). The real hosts are in tests/hosts/.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lara_adapter import LatentAction

HORIZON, ACTION, WIDTH, SIZE = 6, 3, 16, 8


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DitPolicy(nn.Module):
    """[state | action] tokens, flow matching, dict loss with an action mask; draws noise like a real one."""

    def __init__(self, depth: int = 5, width: int = WIDTH, horizon: int = HORIZON) -> None:
        super().__init__()
        self.horizon = horizon
        self.state_in, self.action_in = nn.Linear(2, width), nn.Linear(ACTION + 1, width)
        self.position = nn.Parameter(torch.randn(1, horizon + 1, width) * 0.1)
        self.transformer_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.action_out = nn.Linear(width, ACTION)
        self.checkpointing: str | None = None
        self.hidden_states: list[torch.Tensor] = []

    def denoise(self, state: torch.Tensor, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        time = time[:, None, None].expand(-1, noisy.shape[1], 1)
        x = torch.cat([self.state_in(state)[:, None], self.action_in(torch.cat([noisy, time], -1))], 1) + self.position
        self.hidden_states = [x]
        for block in self.transformer_blocks:
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
            self.hidden_states.append(x)
        return self.action_out(x[:, 1:])

    def loss_of(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        action = batch["action"]
        noise, time = torch.randn_like(action), torch.rand(len(action))
        noisy = time[:, None, None] * action + (1 - time[:, None, None]) * noise
        error = (self.denoise(batch["state"], noisy, time) - (action - noise)) ** 2
        mask = batch.get("action_mask")
        mask = torch.ones_like(error) if mask is None else mask.to(error.dtype)
        return error * mask, mask

    def forward(self, batch: dict) -> dict:
        error, mask = self.loss_of(batch)
        return {"loss": error.sum() / mask.sum().clamp_min(1), "action_loss": error}

    @torch.no_grad()
    def get_action(self, state: torch.Tensor, steps: int = 3) -> torch.Tensor:
        x = torch.randn(len(state), self.horizon, ACTION)
        for i in range(steps):
            x = x + self.denoise(state, x, torch.full((len(state),), i / steps)) / steps
        return x


class TuplePolicy(DitPolicy):
    """(loss, dict), and per sample with reduction="none": LeRobot's shape."""

    def forward(self, batch: dict, reduction: str = "mean"):
        error, mask = self.loss_of(batch)
        if reduction == "none":
            per_sample = error.sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
            return per_sample, {"l2": float(per_sample.detach().mean())}
        loss = error.sum() / mask.sum()
        return loss, {"l2": float(loss.detach())}


class NonePolicy(DitPolicy):
    """(loss, None)."""

    def forward(self, batch: dict):
        error, mask = self.loss_of(batch)
        return error.sum() / mask.sum(), None


class BypassLayer(nn.Module):
    """A layer whose forward the host never calls in training."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bypass_step(self, x)


def bypass_step(layer: BypassLayer, x: torch.Tensor) -> torch.Tensor:
    y = layer.input_layernorm(x)
    x = x + layer.self_attn(y, y, y, need_weights=False)[0]
    return x + layer.mlp(layer.post_attention_layernorm(x))


class BypassPolicy(nn.Module):
    """pi0's shape: joint layers walked by hand, unreduced loss, positional arguments."""

    def __init__(self, depth: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.action_in = nn.Linear(ACTION, width)
        self.layers = nn.ModuleList(BypassLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.action_out = nn.Linear(width, ACTION)
        self.checkpointing: str | None = None
        self.hidden_states: list[torch.Tensor] = []

    def forward(self, observation: dict, actions: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(actions)
        x = self.action_in(noise)
        self.hidden_states = [x]
        for layer in self.layers:
            if self.checkpointing and self.training:
                reentrant = self.checkpointing == "reentrant"
                x = torch.utils.checkpoint.checkpoint(bypass_step, layer, x, use_reentrant=reentrant)
            else:
                x = bypass_step(layer, x)
            self.hidden_states.append(x)
        return (self.action_out(self.norm(x)) - actions) ** 2

    @torch.no_grad()
    def get_action(self, batch: int) -> torch.Tensor:
        x = self.action_in(torch.randn(batch, HORIZON, ACTION))
        for layer in self.layers:
            x = layer(x)
        return self.action_out(self.norm(x))


class OwnOutput(NamedTuple):
    loss: torch.Tensor
    reconstruction_loss: torch.Tensor
    copy_loss: torch.Tensor
    latent: LatentAction


class OwnLam(nn.Module):
    """A user's own latent action model: linear, no quantiser, no flags, with dropout."""

    latent_width = 8

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inverse = nn.Linear(2 * 3 * SIZE * SIZE, 8)
        self.drop = nn.Dropout(dropout)
        self.future = nn.Linear(8, 3 * SIZE * SIZE)

    def encode(self, frame_t: torch.Tensor, frame_future: torch.Tensor) -> LatentAction:
        pair = torch.cat([_float(frame_t).flatten(1), _float(frame_future).flatten(1)], 1)
        z = self.drop(self.inverse(pair))[:, None]
        return LatentAction(z, z, torch.zeros(z.shape[:2], dtype=torch.long))

    def forward(self, frame_t: torch.Tensor, frame_future: torch.Tensor) -> OwnOutput:
        latent = self.encode(frame_t, frame_future)
        target = _float(frame_future).flatten(1)
        loss = F.mse_loss(self.future(latent.quantized.flatten(1)), target)
        return OwnOutput(loss, loss.detach(), F.mse_loss(_float(frame_t).flatten(1), target), latent)


def _float(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()


def make_batch(size: int = 4, seed: int = 0, views: int | None = None, padded: bool = False) -> dict:
    """A batch with frames; `padded`: sample i has HORIZON - i real steps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 2, 3, SIZE, SIZE) if views is None else (size, views, 2, 3, SIZE, SIZE)
    mask = torch.ones(size, HORIZON, ACTION)
    if padded:
        for i in range(size):
            mask[i, HORIZON - i :] = 0
    return {
        "state": torch.randn(size, 2, generator=generator),
        "action": torch.randn(size, HORIZON, ACTION, generator=generator),
        "action_mask": mask,
        "lara_frames": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
    }


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
