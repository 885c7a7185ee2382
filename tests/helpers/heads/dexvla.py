"""DexVLA: the real ScaleDP head, and the real VLA's forward around a stand-in for its copy of Qwen2-VL."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from .common import ACTION, HORIZON, Head
from .sources import checkout, imported

SOURCE = "juruobenruo/DexVLA fc21a82"
_WIDTH, _STATE, _SAMPLES, _WORDS = 24, 5, 2, 9


@contextlib.contextmanager
def _code() -> Iterator[tuple[nn.Module, type]]:
    """A tiny ScaleDP head and the class of the VLA. transformers knows neither afterwards."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mappings = [CONFIG_MAPPING._extra_content, AutoModel._model_mapping._extra_content]
    before = [dict(mapping) for mapping in mappings]
    unused = tuple(f"qwen2_vla.{name}" for name in ("model_load_utils", "train", "utils.processing_qwen2_vla"))
    try:
        with imported(checkout("DexVLA"), checkout("DexVLA") / "policy_heads", empty=unused):
            from models.transformer_diffusion import configuration_scaledp, modeling_scaledp
            from qwen2_vla.models.modeling_qwen2_vla import Qwen2VLForConditionalGenerationForVLA

            configuration_scaledp.MODEL_STRUCTURE["tiny"] = {"depth": 4, "n_emb": 32, "num_heads": 4}
            config = configuration_scaledp.ScaleDPPolicyConfig(
                action_dim=ACTION, cond_dim=_WIDTH, state_dim=_STATE, prediction_horizon=HORIZON, model_size="tiny",
                noise_samples=_SAMPLES, num_inference_timesteps=2,
            )  # fmt: skip
            # its embedding of time is in bfloat16 whatever the weights are
            yield modeling_scaledp.ScaleDP(config).bfloat16(), Qwen2VLForConditionalGenerationForVLA
    finally:
        for mapping, content in zip(mappings, before):
            mapping.clear()
            mapping.update(content)


def head_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "actions": torch.randn(size, HORIZON, ACTION).bfloat16(),
        "hidden_states": torch.randn(size, 1, _WIDTH).bfloat16(),
        "states": torch.randn(size, _STATE).bfloat16(),
        "is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
    }


def vla_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (size, _WORDS))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "labels": torch.where(torch.arange(_WORDS) < 5, -100, ids),
        "actions": torch.randn(size, HORIZON, ACTION),
        "states": torch.randn(size, _STATE),
        "is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
    }


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    head = getattr(policy, "policy_head", policy)
    given = head_batch(1, 3)
    with torch.no_grad(), mock.patch.object(torch.Tensor, "cuda", lambda self: self):  # hard-coded
        return head(None, given["hidden_states"], given["states"], None)


# alone or in the VLA
_SCALEDP: dict[str, Any] = {
    "source": SOURCE, "length": HORIZON, "token": HORIZON - 1, "draws": _SAMPLES, "action": "actions", "padding": "is_pad",
    "keywords": True, "sample": sample,
}  # fmt: skip


def build() -> Head:
    """The head alone, called as the VLA calls it."""
    with _code() as (head, _):
        pass
    return Head(
        policy=head.train(),
        make_batch=head_batch,
        blocks="blocks",
        **_SCALEDP,
    )


class Qwen(nn.Module):
    """In place of DexVLA's copy of Qwen2-VL's language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, _WIDTH)
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(4))

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)
        return _Output((inputs_embeds,))


class _Output(tuple):
    past_key_values = hidden_states = attentions = None


def build_vla() -> Head:
    """The whole VLA: its own forward and ScaleDP."""
    with _code() as (head, vla):
        pass
    to = torch.Tensor.to

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("device", None)
        args = tuple(value for value in args if value != "cuda")
        return to(self, *args, **kwargs) if args or kwargs else self

    class OnCpu(vla):
        """The device is hard-coded."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.config = SimpleNamespace(
                vocab_size=64, output_attentions=False, output_hidden_states=True, use_return_dict=True,
                vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=60, video_token_id=61,
                vision_start_token_id=62, _attn_implementation="sdpa",
            )  # fmt: skip
            fusion = vla.forward.__globals__
            fusion["gc"] = SimpleNamespace(collect=lambda: 0)  # in each forward: most of its time
            self.model, self.lm_head = Qwen(), nn.Linear(_WIDTH, 64)
            self.policy_head, self.using_film, self.llm_loss_weight = head, True, 0.1
            self.input_action_proj = fusion["ActionProjector"](_WIDTH, _WIDTH)
            self.reasoning_action_proj = fusion["ActionProjector"](_WIDTH, _WIDTH)
            self.reasoning_film = fusion["FiLM"](_WIDTH, _WIDTH)
            self.bfloat16()

        @functools.wraps(vla.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(torch.Tensor, "to", stay):
                return super().forward(*args, **kwargs)

    return Head(
        policy=OnCpu().train(),
        make_batch=vla_batch,
        blocks="policy_head.blocks",
        stand_in="the language model; no images",
        **_SCALEDP,
    )
