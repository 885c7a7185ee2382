"""RDT-1B: the real RDTRunner. Its encoders of text and images run outside it, so there is nothing else."""

from __future__ import annotations

import torch
from torch import nn

from .common import HORIZON, Head
from .sources import checkout, imported

_WORDS, _PATCHES, _ACTION = 5, 6, 16
_CONFIG = {
    "rdt": {"hidden_size": 32, "depth": 4, "num_heads": 4},
    "lang_adaptor": "mlp2x_gelu",
    "img_adaptor": "mlp2x_gelu",
    "state_adaptor": "mlp3x_gelu",
    "noise_scheduler": {
        "num_train_timesteps": 100,
        "num_inference_timesteps": 2,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
        "clip_sample": False,
    },
}


def make_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(size, 1, _ACTION)
    mask[..., :9] = 1  # dimensions that this robot has, and not steps
    return {
        "lang_tokens": torch.randn(size, _WORDS, 24),
        "lang_attn_mask": torch.ones(size, _WORDS, dtype=torch.bool),
        "img_tokens": torch.randn(size, _PATCHES, 20),
        "state_tokens": torch.randn(size, 1, _ACTION),
        "action_gt": torch.randn(size, HORIZON, _ACTION),
        "action_mask": mask,
        "ctrl_freqs": torch.full((size,), 25),
    }


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    batch = make_batch(2, 3)
    del batch["action_gt"]
    with torch.no_grad():
        return policy.predict_action(**batch)


def build() -> Head:
    with imported(checkout("RDT")):
        from models.rdt_runner import RDTRunner

        policy = RDTRunner(
            action_dim=_ACTION,
            pred_horizon=HORIZON,
            config=_CONFIG,
            lang_token_dim=24,
            img_token_dim=20,
            state_token_dim=_ACTION,
            max_lang_cond_len=8,
            img_cond_len=_PATCHES,
            dtype=torch.float32,
        ).train()
    return Head(
        policy=policy,
        make_batch=make_batch,
        source="thu-ml/RoboticsDiffusionTransformer deb71d8",
        blocks="model.blocks",
        length=3 + HORIZON,
        token=2 + HORIZON,
        action="action_gt",
        keywords=True,
        sample=sample,
    )
