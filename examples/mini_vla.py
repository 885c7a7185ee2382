"""A small flow-matching diffusion-transformer policy in GR00T's shape, to read and to copy.

One state token and the action tokens of a noisy chunk go through a diffusion transformer (DiT). Its even blocks
cross-attend to the observation (image tokens and a task token), its odd blocks self-attend; the flow time modulates
every block (adaLN). The network predicts the velocity that carries noise to actions:

    A^tau = tau * A + (1 - tau) * noise,      target = A - noise

It does not depend on LARA. To train it with LARA, the training script adds one line:

    lara = attach_lara(policy, lam, layer=-3)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class MiniVLAConfig:
    """Sizes of the policy; the defaults make 0.74 million parameters."""

    action_dim: int = 4
    horizon: int = 16  # actions per chunk
    state_dim: int = 4
    num_tasks: int = 2
    views: tuple[str, ...] = ("image",)  # keys of the cameras' images in a batch
    image_size: int = 64
    width: int = 96
    depth: int = 4  # DiT blocks: cross-, self-, cross-, self-attention
    heads: int = 4
    sampling_steps: int = 5  # Euler steps from noise to actions
    # GR00T draws tau = 0.999 * (1 - u), u ~ Beta(1.5, 1): mostly early, noisy times.
    time_alpha: float = 1.5
    time_beta: float = 1.0
    time_scale: float = 0.999

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MiniVLAConfig:
        """Infer tasks, width and depth from a policy's state_dict; the other sizes are the defaults."""
        num_tasks, width = state["backbone.task.weight"].shape
        blocks = {name.split(".")[3] for name in state if name.startswith("action_head.model.transformer_blocks.")}
        return cls(num_tasks=num_tasks, width=width, depth=len(blocks))


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Embed positions.

    Args:
        position: [...] float.
        width: length of the embedding, even.

    Returns:
        [..., width] sines and cosines.
    """
    frequency = torch.exp(torch.arange(width // 2, device=position.device) * (-math.log(10000.0) / (width // 2)))
    angle = position[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context` (to itself without one)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend: x [B, N, D], context [B, M, D], mask [B or 1, 1, N, M] bool, True: may attend -> [B, N, D]."""
        key, value = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Attention after an adaptive layer norm, then a feed-forward network: GR00T's transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        """Run one block: x [B, N, D], time [B, D], context [B, M, D] or None for self-attention -> [B, N, D]."""
        scale, shift = self.modulation(F.silu(time))[:, None].chunk(2, dim=-1)
        x = x + self.attention(self.norm1(x) * (1 + scale) + shift, context)
        return x + self.feed_forward(self.norm2(x))


class DiT(nn.Module):
    """The diffusion transformer: even blocks cross-attend to the context, odd blocks self-attend."""

    def __init__(self, config: MiniVLAConfig) -> None:
        super().__init__()
        width = config.width
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer_blocks = nn.ModuleList(DiTBlock(width, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)

    def forward(self, tokens: Tensor, context: Tensor, tau: Tensor) -> Tensor:
        """Denoise: tokens [B, N, D], context [B, M, D], tau [B] flow time -> [B, N, D]."""
        time = self.time_embedding(sinusoid(1000.0 * tau, tokens.shape[-1]))
        for index, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, time, context if index % 2 == 0 else None)
        scale, shift = self.modulation_out(F.silu(time))[:, None].chunk(2, dim=-1)
        return self.norm_out(tokens) * (1 + scale) + shift


class FlowMatchingActionHead(nn.Module):
    """Predict the velocity of the actions from state and noisy actions."""

    def __init__(self, config: MiniVLAConfig) -> None:
        super().__init__()
        width = config.width
        self.state_encoder = nn.Sequential(nn.Linear(config.state_dim, width), nn.GELU(), nn.Linear(width, width))
        self.action_encoder = nn.Sequential(nn.Linear(config.action_dim, width), nn.GELU(), nn.Linear(width, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + config.horizon, width))
        self.model = DiT(config)
        self.action_decoder = nn.Linear(width, config.action_dim)

    def forward(self, noisy_action: Tensor, tau: Tensor, state: Tensor, context: Tensor) -> Tensor:
        """Predict: noisy_action [B, T, A], tau [B], state [B, S], context [B, M, D] -> velocity [B, T, A]."""
        tokens = torch.cat([self.state_encoder(state)[:, None], self.action_encoder(noisy_action)], dim=1)
        hidden = self.model(tokens + self.position, context, tau)
        return self.action_decoder(hidden[:, 1:])


class Backbone(nn.Module):
    """A stand-in for a vision-language model: image tokens from a small CNN, and one task token."""

    def __init__(self, config: MiniVLAConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, 32, 64, 96, config.width)
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
        self.cnn = nn.Sequential(*layers)
        side = math.ceil(config.image_size / 16)
        self.position = nn.Parameter(0.02 * torch.randn(1, len(config.views) * side * side, config.width))
        self.task = nn.Embedding(config.num_tasks, config.width)

    def forward(self, images: Sequence[Tensor], task: Tensor) -> Tensor:
        """Encode: an image [B, 3, H, W] uint8 per view, task [B] int -> tokens [B, M, D], the task token last."""
        features = self.cnn(torch.cat(list(images)).float() / 127.5 - 1).flatten(2).transpose(1, 2)
        tokens = torch.cat(features.chunk(len(images)), dim=1) + self.position
        return torch.cat([tokens, self.task(task)[:, None]], dim=1)


class MiniVLA(nn.Module):
    """The policy: `forward` trains, `get_action` acts. Batches and observations are plain dicts of tensors."""

    def __init__(self, config: MiniVLAConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MiniVLAConfig()
        self.backbone = Backbone(config)
        self.action_head = FlowMatchingActionHead(config)
        self.register_buffer("state_mean", torch.zeros(config.state_dim))
        self.register_buffer("state_std", torch.ones(config.state_dim))

    def set_state_statistics(self, states: Tensor) -> None:
        """Set the mean and standard deviation that normalise the state from the training states [N, S]."""
        self.state_mean.copy_(states.mean(0))
        self.state_std.copy_(states.std(0).clamp_min(1e-3))

    def _see(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the normalised state [B, S] and the context tokens [B, M, D]."""
        state = (inputs["state"] - self.state_mean) / self.state_std
        return state, self.backbone([inputs[view] for view in self.config.views], inputs["task"])

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the flow-matching loss.

        Args:
            batch: `image` (each of `config.views`) [B, 3, H, W] uint8, `state` [B, S] float, `task` [B] int64, `action`
                [B, T, A] float in [-1, 1], `action_mask` [B, T, A] float, 1 where the action is real and 0 where it is
                padding.

        Returns:
            `loss`, the mean squared error of the velocity over the unmasked actions.
        """
        action, mask, config = batch["action"], batch["action_mask"], self.config
        noise = torch.randn_like(action)
        one = torch.ones((), device=action.device)
        u = torch.distributions.Beta(config.time_alpha * one, config.time_beta * one).sample((len(action),))
        tau = config.time_scale * (1 - u)
        noisy = tau[:, None, None] * action + (1 - tau)[:, None, None] * noise
        velocity = self.action_head(noisy, tau, *self._see(batch))
        error = (velocity - (action - noise)).square() * mask
        return {"loss": error.sum() / mask.sum().clamp_min(1)}

    @torch.no_grad()
    def get_action(self, observation: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Sample a chunk of actions by Euler steps from noise.

        Args:
            observation: images, `state` and `task` as in :meth:`forward`.
            noise: [B, T, A] float, the start of the flow; None: drawn.

        Returns:
            [B, T, A] float: actions, clipped to [-1, 1].
        """
        state, context = self._see(observation)
        if noise is None:
            noise = torch.randn(len(state), self.config.horizon, self.config.action_dim, device=state.device)
        action, steps = noise, self.config.sampling_steps
        for step in range(steps):
            tau = torch.full((len(state),), step / steps, device=state.device)
            action = action + self.action_head(action, tau, state, context) / steps
        return action.clamp(-1, 1)
