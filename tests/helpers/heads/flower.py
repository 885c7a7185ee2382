"""FLOWER: the real Lightning module with its flow transformer, around a stand-in for Florence-2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from .common import HORIZON, Head, calvin_scope
from .sources import checkout, imported

_WIDTH = 24
_OPTIMIZER = SimpleNamespace(transformer_weight_decay=0.05, learning_rate=1e-4, betas=(0.9, 0.95))
_SCHEDULER = {
    "lr_scheduler": {
        "init_lr": 1e-4, "init_lr_scale": 0.1, "final_lr_scale": 0.5, "total_steps": 100, "lr": 1e-4,
        "phase_ratio": "(0.1, 0.1, 0.8)",
    }
}  # fmt: skip


class Florence(nn.Module):
    """What FLOWER calls of Florence-2, its processor and its tokenizer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(text_config=SimpleNamespace(d_model=_WIDTH))
        self.vision_tower, self.words = nn.Linear(3, _WIDTH), nn.Embedding(64, _WIDTH)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.decoder, self.language_model.lm_head = nn.Identity(), nn.Identity()
        self.encoder = _Encoder()

    def resize_token_embeddings(self, size: int) -> None:
        pass

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def _encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision_tower(images.mean((2, 3)))[:, None]


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.mix(inputs_embeds))


class Tokenizer:
    def add_special_tokens(self, tokens: dict) -> None:
        pass

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def __len__(self) -> int:
        return 64

    def __call__(self, texts: list[str], **kwargs: Any) -> Any:
        ids = torch.tensor([[len(word) for word in text.split()[-3:]] for text in texts])
        return _OnDevice(input_ids=ids)


class _OnDevice(dict):
    def to(self, device: Any) -> _OnDevice:
        return self


class _Functional:
    """torch.nn.functional, with an attention that takes a causal mask and `is_causal` at once, as older torch did."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def scaled_dot_product_attention(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> Any:
        causal = is_causal and attn_mask is None
        return F.scaled_dot_product_attention(*args, attn_mask=attn_mask, is_causal=causal, **kwargs)


def make_batch(size: int, seed: int) -> dict[str, Any]:
    """CALVIN's two scopes: one sample with a goal image, the rest with language."""
    return {"lang": calvin_scope(size - 1, images=1), "vis": calvin_scope(1, images=1)}


def sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return policy(calvin_scope(1, images=1), {"lang_text": "push the block"})


def build() -> Head:
    with imported(checkout("flower"), empty=("wandb",)):
        import flower.models.flower as module
        from flower.models.networks import transformers

        transformers.F = _Functional()

        florence = SimpleNamespace(from_pretrained=lambda *args, **kwargs: Florence())
        processor = SimpleNamespace(from_pretrained=lambda *args, **kwargs: SimpleNamespace(tokenizer=Tokenizer()))
        with mock.patch.multiple(module, AutoModelForCausalLM=florence, AutoProcessor=processor):
            policy = module.FLOWERVLA(
                "tiny",
                optimizer=_OPTIMIZER,
                lr_scheduler=_SCHEDULER,
                act_window_size=HORIZON,
                dit_dim=32,
                n_heads=4,
                n_layers=4,
                num_sampling_steps=2,
            ).train()
    policy.optimizers = lambda: None  # asked of Lightning's trainer, and not used
    return Head(
        policy=policy,
        make_batch=make_batch,
        source="intuitive-robots/flower_vla_calvin acb32ee",
        blocks="dit",
        length=HORIZON,
        token=HORIZON - 1,
        entry="training_step",
        action="actions",
        more=(0,),
        stand_in="Florence-2",
        optimizer=lambda policy: policy.configure_optimizers()["optimizer"],
        sample=sample,
    )
