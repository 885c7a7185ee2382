"""A policy with what a real one has (tied weights, statistics, a frozen part), LARA on it, and a few training steps."""

from __future__ import annotations

import torch
from helpers.models import TINY
from helpers.toys import DitPolicy, make_batch
from torch import nn

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara

TARGETS = ["mlp.0", "mlp.2"]
SMALL = {**TINY, "vq_revive_every": 4}


class Host(DitPolicy):
    """A policy with what a real one has: tied weights, running statistics, a frozen part, a buffer that is not state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_state = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.state_again = nn.Linear(2, 16, bias=False)
        self.state_again.weight = self.state_in.weight
        self.register_buffer("bound", torch.tensor([float("inf")]))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def denoise(self, state, noisy, time):
        state = self.norm_state(self.frozen(state))
        return super().denoise(state, noisy, time) + self.state_again(state).mean()


def build(kind=Host, lora=None, seed=0):
    torch.manual_seed(seed)
    policy = kind().train()
    if lora is not None:
        import peft

        policy = peft.get_peft_model(policy, lora)
    return policy


def lara_on(policy, **changes):
    lam = LatentActionModel(LatentActionConfig.tiny(**SMALL))
    return attach_lara(policy, lam, **{"align_weight": 0.3, "lam_weight": 0.2, **changes})


def train(policy, optimizer, steps):
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        loss = policy(make_batch(seed=step))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_of(policy):
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
