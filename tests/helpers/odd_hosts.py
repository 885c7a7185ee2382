"""A small flow-matching policy whose parts can be made odd one by one, as hosts that nobody here had tried are."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from .toys import ACTION, HORIZON, WIDTH, Block

BATCH = 4


class Host(nn.Module):
    """[state | actions] tokens through `blocks`; subclasses override one method."""

    dropout = 0.0

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.state_in, self.action_in, self.time_in = (nn.Linear(n, WIDTH) for n in (2, ACTION, 1))
        self.drop = nn.Dropout(self.dropout)
        self.flow_blocks = nn.ModuleList(Block() for _ in range(depth))
        self.action_out = nn.Linear(WIDTH, ACTION)

    def noise(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn_like(action), torch.rand(len(action))

    def embed(self, state: torch.Tensor, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.state_in(state)[:, None], self.action_in(noisy)], 1)
        return self.drop(x + self.time_in(time[:, None])[:, None])

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.flow_blocks:
            x = block(x)
        return x

    def actions_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.action_out(x[:, -HORIZON:])

    def loss_of(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        noise, time = self.noise(action)
        noisy = time[:, None, None] * action + (1 - time[:, None, None]) * noise
        velocity = self.actions_of(self.trunk(self.embed(state, noisy, time)))
        return (velocity - (action - noise)).square().mean()

    def forward(self, batch: dict) -> dict:
        return {"loss": self.loss_of(batch["state"], batch["action"])}


def make_batch(size: int = BATCH, seed: int = 0) -> dict:
    """state [B, 2], action [B, T, A], lara_frames [B, 2, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "state": torch.randn(size, 2, generator=generator),
        "action": torch.randn(size, HORIZON, ACTION, generator=generator),
        "lara_frames": torch.rand(size, 2, 3, 8, 8, generator=generator),
    }


class Repeats(Host):
    """Several noise draws of each sample in one batch."""

    def __init__(self, order: str, draws: int = 2) -> None:
        super().__init__()
        self.order, self.draws = order, draws

    def forward(self, batch: dict) -> dict:
        def repeated(x: torch.Tensor) -> torch.Tensor:
            if self.order == "tile":
                return x.repeat(self.draws, *[1] * (x.ndim - 1))
            return x.repeat_interleave(self.draws, 0)

        return {"loss": self.loss_of(repeated(batch["state"]), repeated(batch["action"]))}


class Shuffles(Host):
    """Sorts the samples before the head."""

    def forward(self, batch: dict) -> dict:
        return {"loss": self.loss_of(batch["state"].flip(0), batch["action"].flip(0))}


class ActionsFirst(Host):
    """[actions | state]."""

    def embed(self, state, noisy, time):
        return super().embed(state, noisy, time).roll(-1, 1)

    def actions_of(self, x):
        return self.action_out(x[:, :HORIZON])


class SequenceFirst(Host):
    """The blocks work on [S, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.flow_blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, norm_first=True) for _ in range(4)
        )

    def trunk(self, x):
        return super().trunk(x.transpose(0, 1)).transpose(0, 1)


class TwoStreamBlock(nn.Module):
    """Takes and returns (context, hidden), as SD3's and Flux' do."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = Block()

    def forward(self, *, hidden_states, encoder_hidden_states):
        x = self.joint(torch.cat([encoder_hidden_states, hidden_states], 1))
        length = encoder_hidden_states.shape[1]
        return x[:, :length], x[:, length:]


class TwoStreams(Host):
    """A context stream beside the action stream."""

    def __init__(self, context: int = 5) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.randn(1, context, WIDTH))
        self.flow_blocks = nn.ModuleList(TwoStreamBlock() for _ in range(4))

    def trunk(self, x):
        context = self.context.expand(len(x), -1, -1)
        for block in self.flow_blocks:
            context, x = block(hidden_states=x, encoder_hidden_states=context)
        return x


class InsideASequence(Host):
    """Action tokens inside a language model's sequence, where `input_ids` is 7; padding behind them."""

    def loss_of_batch(self, batch: dict) -> torch.Tensor:
        noise, time = self.noise(batch["action"])
        noisy = time[:, None, None] * batch["action"] + (1 - time[:, None, None]) * noise
        x = torch.zeros(*batch["input_ids"].shape, WIDTH)
        where = batch["input_ids"] == 7
        x = x.masked_scatter(where[..., None], self.action_in(noisy)) + self.state_in(batch["state"])[:, None]
        velocity = self.action_out(self.trunk(x)[where]).view_as(noise)
        return (velocity - (batch["action"] - noise)).square().mean()

    def forward(self, batch: dict) -> dict:
        return {"loss": self.loss_of_batch(batch)}

    @staticmethod
    def batch(size: int = BATCH) -> dict:
        ids = torch.zeros(size, HORIZON + 6, dtype=torch.long)
        for sample in range(size):
            ids[sample, sample % 3 : sample % 3 + HORIZON] = 7
        return {**make_batch(size), "input_ids": ids}


class FromNumpy(Host):
    """Noise from numpy and from random, not from torch."""

    def noise(self, action):
        noise = torch.from_numpy(np.random.randn(*action.shape)).float()
        return noise, torch.tensor([random.random() for _ in range(len(action))])


class OwnGenerator(Host):
    """Noise from a generator that no global seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def noise(self, action):
        return torch.randn(action.shape, generator=self.generator), torch.rand(len(action), generator=self.generator)


class VisionBeside(Host):
    """Another list of attention blocks, which sees no action."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Module()
        self.vision.blocks = nn.ModuleList(Block() for _ in range(4))

    def embed(self, state, noisy, time):
        seen = self.state_in(state)[:, None].expand(-1, HORIZON + 1, -1)
        for block in self.vision.blocks:
            seen = block(seen)
        return super().embed(state, noisy, time) + seen[:, :1]
