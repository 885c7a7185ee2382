"""starVLA: the real frameworks and flow-matching heads around a stand-in for Qwen-VL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from .common import ACTION, HORIZON, Head
from .sources import checkout, imported

SOURCE = "starVLA/starVLA 0ed0aad"
_WIDTH, _LAYERS, _FUTURE, _STATE = 64, 4, 4, 5
_INSTRUCTIONS = ("push the block", "open the drawer", "close it")


class Qwen(nn.Module):
    """What the frameworks call of starVLA's interface to Qwen-VL; the image counts by its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.colour = nn.Embedding(64, _WIDTH), nn.Linear(3, _WIDTH)
        self.model = nn.Module()
        self.model.config = SimpleNamespace(hidden_size=_WIDTH, num_hidden_layers=_LAYERS)
        self.model.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))

    def build_qwenvl_inputs(self, images: list, instructions: list[str]) -> dict[str, torch.Tensor]:
        colours = [np.asarray(views[0], np.float32).mean((0, 1)) / 255 for views in images]
        ids = torch.tensor([[len(word) for word in (text.split() * 3)[:6]] for text in instructions])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "colour": torch.tensor(np.stack(colours))}

    def forward(self, input_ids: torch.Tensor, colour: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        state = self.words(input_ids) + self.colour(colour)[:, None]
        states = [state]
        for layer in self.model.layers:
            states.append(states[-1] + layer(states[-1]))
        return SimpleNamespace(hidden_states=tuple(states))


def make_batch(size: int, seed: int) -> list[dict[str, Any]]:
    from PIL import Image

    draw = np.random.default_rng(seed)
    return [
        {
            "image": [Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8))],
            "lang": _INSTRUCTIONS[index % len(_INSTRUCTIONS)],
            "action": draw.standard_normal((HORIZON, ACTION), np.float32),
            "state": draw.standard_normal((1, _STATE), np.float32),
        }
        for index in range(size)
    ]


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    examples = [{k: v for k, v in example.items() if k != "action"} for example in make_batch(2, 3)]
    return torch.as_tensor(policy.predict_action(examples)["normalized_actions"])


def _build(name: str, class_name: str, draws: int, **head: Any) -> Head:
    with imported(checkout("starVLA")):
        import importlib

        from omegaconf import OmegaConf

        module = importlib.import_module(f"starVLA.model.framework.VLM4A.{name}")
        heads = importlib.import_module("starVLA.model.modules.action_model.GR00T_ActionHeader")
        action_model = {
            "action_dim": ACTION, "state_dim": _STATE, "action_horizon": HORIZON, "hidden_size": 32, "max_seq_len": 64,
            "num_target_vision_tokens": _FUTURE, "num_inference_timesteps": 2, **head,
        }  # fmt: skip
        config = OmegaConf.create({"framework": {"action_model": action_model}, "datasets": {"vla_data": {}}})
        sizes = {"tiny": {"input_embedding_dim": 32, "attention_head_dim": 8, "num_attention_heads": 4}}
        with (
            mock.patch.object(module, "get_vlm_model", return_value=Qwen()),
            mock.patch.dict(heads.DiTConfig, sizes),
        ):
            policy = getattr(module, class_name)(config).train()
    return Head(
        policy=policy,
        make_batch=make_batch,
        source=SOURCE,
        blocks="action_model.model.transformer_blocks",
        length=1 + _FUTURE + HORIZON,
        token=_FUTURE + HORIZON,
        draws=draws,
        stand_in="Qwen-VL",
        sample=sample,
    )


def build_groot(name: str = "QwenGR00T", class_name: str = "Qwen_GR00T") -> Head:
    head = {
        "action_model_type": "tiny", "repeated_diffusion_steps": 3,
        "diffusion_model_cfg": {"num_layers": 4, "output_dim": 32},
    }  # fmt: skip
    return _build(name, class_name, 3, **head)


def build_pi() -> Head:
    return _build("QwenPI", "Qwen_PI", 2)
