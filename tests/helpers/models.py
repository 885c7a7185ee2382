"""Policies whose loss is a function of the batch alone, so that runs can be compared gradient by gradient."""

from __future__ import annotations

import torch

from lara_adapter import LatentActionConfig, LatentActionModel, PolicySpec, attach_lara, policies

from .toys import BypassPolicy, DitPolicy, OwnLam, bypass_step


class FixedDit(DitPolicy):
    """DitPolicy with fixed noise and three blocks; its states are not recorded (compile would take them for outputs)."""

    def __init__(self, depth: int = 3, **arguments) -> None:
        super().__init__(depth, **arguments)

    def loss_of(self, batch):
        action = batch["action"]
        velocity = self.denoise(batch["state"], 0.5 * action, batch["state"][:, 0])
        error = (velocity - action) ** 2
        return error, torch.ones_like(error)

    def denoise(self, state, noisy, time):
        out = super().denoise(state, noisy, time)
        self.hidden_states = []
        return out


class FixedBypass(BypassPolicy):
    """BypassPolicy with fixed noise, three layers, a batch as its argument and a dict loss."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)

    def forward(self, batch):
        x = self.action_in(0.5 * batch["action"])
        for layer in self.layers:
            if self.checkpointing and self.training:
                reentrant = self.checkpointing == "reentrant"
                x = torch.utils.checkpoint.checkpoint(bypass_step, layer, x, use_reentrant=reentrant)
            else:
                x = bypass_step(layer, x)
        return {"loss": ((self.action_out(self.norm(x)) - batch["action"]) ** 2).mean()}


def register_bypass() -> None:
    spec = PolicySpec("fixed-bypass", ("helpers:FixedBypass",), "layers", tap="norm", final_norm="norm")
    if not any(row.name == spec.name for row in policies._TABLE):
        policies.register_policy(spec)


def build(kind: str = "output", lam: str = "own", **arguments):
    """A policy of the given tap kind with LARA attached; deterministic."""
    register_bypass()
    torch.manual_seed(0)
    policy = {"output": FixedDit, "norm": FixedBypass}[kind]().train()
    model = OwnLam() if lam == "own" else LatentActionModel(LatentActionConfig.tiny(**TINY))
    lara = attach_lara(policy, model, **{"align_weight": 0.3, "lam_weight": 0.2, **arguments})
    return policy, lara


TINY = {"encoder_width": 16, "idm_width": 16, "idm_mlp": 16, "fdm_width": 16, "fdm_mlp": 16, "fdm_layers": 1,
        "vq_warmup_steps": 2}  # fmt: skip
