"""CogACT: its own class and diffusion head; Prismatic's VLM is on no registry, so a small network stands in."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from .common import ACTION, HORIZON, Head
from .sources import checkout, imported

_WIDTH, _PATCHES, _STEPS = 4096, 4, 2  # the width of the unconditional token is hard-coded


class Vlm(nn.Module):
    """What CogACT calls of PrismaticVLM."""

    all_module_keys = ("words",)
    trainable_module_keys = ("words",)

    def __init__(self) -> None:
        super().__init__()
        self.words, self.colour = nn.Embedding(64, _WIDTH), nn.Linear(3, _WIDTH)
        patches = SimpleNamespace(num_patches=_PATCHES)
        self.vision_backbone = SimpleNamespace(featurizer=SimpleNamespace(patch_embed=patches))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs) -> SimpleNamespace:
        image = self.colour(pixel_values.mean((2, 3)))[:, None].expand(-1, _PATCHES, -1)
        words = self.words(input_ids) + image.mean(1, keepdim=True)
        return SimpleNamespace(hidden_states=(torch.cat([image, words], 1),))


def make_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (size, 6))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "actions": torch.randn(size, HORIZON, ACTION),
        "pixel_values": torch.rand(size, 3, 8, 8),
        "action_masks": torch.ones(size, HORIZON, dtype=torch.bool),
        "labels": ids,
        "output_hidden_states": True,
        "repeated_diffusion_steps": _STEPS,
    }


def sample(policy: nn.Module) -> torch.Tensor:
    """The head's own DDIM; predict_action around it needs Llama's tokenizer."""
    torch.manual_seed(3)
    head = policy.action_model
    noise, condition = torch.randn(2, HORIZON, ACTION), torch.randn(2, 1, _WIDTH)
    sampler = head.create_ddim(ddim_step=2)
    with torch.inference_mode():
        return sampler.ddim_sample_loop(
            head.net, noise.shape, noise, clip_denoised=False, model_kwargs={"z": condition}, device="cpu", eta=0.0
        )


def build(use_ema: bool = False) -> Head:
    with imported(checkout("CogACT"), empty=("prismatic",)):
        import action_model.action_model as module
        from vla import CogACT

        tiny = {"tiny": lambda **kwargs: module.DiT(depth=4, hidden_size=32, num_heads=4, **kwargs)}
        with mock.patch.dict(module.DiT_models, tiny):
            policy = CogACT(
                Vlm(), "tiny", _WIDTH, ACTION, future_action_window_size=HORIZON - 1, use_ema=use_ema
            ).train()
    return Head(
        policy=policy,
        make_batch=make_batch,
        source="microsoft/CogACT b174a1b",
        blocks="action_model.net.blocks",
        length=1 + HORIZON,
        token=HORIZON,
        draws=_STEPS,
        action="actions",
        keywords=True,
        stand_in="the VLM",
        sample=sample,
    )
