"""Policies of LeRobot's main branch that no release has yet: EVO1 and EO1, with their real VLMs."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from torch import nn

from .common import ACTION, HORIZON, Head
from .sources import checkout, imported

SOURCE = "huggingface/lerobot 7427f31"
FRAMES = "observation.lara.frames"  # LeRobot's processors keep only observation.* keys
_CAMERA, _STATE = "observation.images.cam", "observation.state"
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip


def _features() -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    return {
        "input_features": {
            _CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            _STATE: PolicyFeature(FeatureType.STATE, (4,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
    }


def _optimizer(policy: nn.Module) -> torch.optim.Optimizer:
    """As lerobot-train makes it."""
    return policy.config.get_optimizer_preset().build(policy.get_optim_params())


# ---------------------------------------------------------------------- EVO1: InternVL and the flow-matching head


@functools.lru_cache(maxsize=1)
def _internvl_folder() -> str:
    """A tiny InternVL with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import InternVLConfig, InternVLModel, PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    special = ["<IMG_CONTEXT>", "<img>", "</img>"]
    words = ["<pad>", "<unk>", *special, "push", "open", "close", "the", "block", "drawer", "Image", "-", "1", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(folder)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [32, 32], "patch_size": [16, 16],
        },
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=words.index("<IMG_CONTEXT>"), image_seq_length=1, downsample_ratio=0.5,
    )  # fmt: skip
    InternVLModel(config).save_pretrained(folder)
    return folder


def evo1_batch(size: int, seed: int) -> dict[str, Any]:
    texts = ("push the block", "open the drawer", "close it")
    return {
        _CAMERA: torch.rand(size, 3, 32, 32),
        _STATE: torch.randn(size, 4),
        "action": torch.randn(size, HORIZON, ACTION),
        "action_is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
        "task": [texts[index % 3] for index in range(size)],
    }


def evo1_sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    batch = {key: value for key, value in evo1_batch(2, 3).items() if "action" not in key}
    return policy.predict_action_chunk(batch)


def build_evo1() -> Head:
    with imported(checkout("lerobot") / "src"):
        from lerobot.policies.evo1.configuration_evo1 import Evo1Config
        from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

        config = Evo1Config(
            device="cpu", chunk_size=HORIZON, n_action_steps=HORIZON, max_state_dim=6, max_action_dim=9, max_views=1,
            image_resolution=(32, 32), vlm_model_name=_internvl_folder(), vlm_num_layers=2, vlm_dtype="float32",
            use_flash_attn=False, embed_dim=32, hidden_dim=32, state_hidden_dim=32, num_heads=4, num_layers=4,
            num_inference_timesteps=2, **_features(),
        )  # fmt: skip
        policy = Evo1Policy(config).train()
    return Head(
        policy=policy,
        make_batch=evo1_batch,
        source=SOURCE,
        blocks="model.action_head.transformer_blocks",
        length=HORIZON,
        token=HORIZON - 1,
        frames=FRAMES,
        padding="action_is_pad",
        optimizer=_optimizer,
        sample=evo1_sample,
    )


# ---------------------------------------------------------------------- EO1: action tokens inside Qwen2.5-VL's sequence

_PAD, _IMAGE, _START, _END, _STATE_ID, _ACTION_ID, _STOP = 0, 1, 2, 3, 4, 5, 6
_WORDS = (3, 2, 5)  # so that the action tokens stand elsewhere in each sample
_AFTER = 2  # tokens that end the turn


def _sequence(words: int) -> list[int]:
    text = [10 + index for index in range(words)]
    return [_START, _IMAGE, _END, *text, _STATE_ID, *[_ACTION_ID] * HORIZON, *[_STOP] * _AFTER]


def eo1_batch(size: int, seed: int, left: bool = False) -> dict[str, Any]:
    """As EO1's processor makes it: padded on the right to train, on the left to act."""
    rows = [_sequence(_WORDS[index % 3]) for index in range(size)]
    longest = max(map(len, rows))
    padding = [[_PAD] * (longest - len(row)) for row in rows]
    ids = torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding)])
    return {
        _STATE: torch.randn(size, 4),
        "action": torch.randn(size, HORIZON, ACTION),
        "action_is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
        "input_ids": ids,
        "attention_mask": (ids != _PAD).long(),
        "mm_token_type_ids": (ids == _IMAGE).int(),
        "pixel_values": torch.randn(size * 4, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * size),
        "state_token_id": _STATE_ID,
        "action_token_id": _ACTION_ID,
    }


def eo1_sample(policy: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    batch = eo1_batch(2, 3, left=True)
    return policy.predict_action_chunk({k: v for k, v in batch.items() if k not in ("action", "action_is_pad")})


def build_eo1(**settings: Any) -> Head:
    from transformers import Qwen2_5_VLConfig

    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vlm = Qwen2_5_VLConfig(
        image_token_id=_IMAGE, video_token_id=60, vision_start_token_id=_START, vision_end_token_id=_END,
        text_config=text,
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 16, "window_size": 64,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    )  # fmt: skip
    with imported(checkout("lerobot") / "src"):
        from lerobot.policies.eo1.configuration_eo1 import EO1Config
        from lerobot.policies.eo1.modeling_eo1 import EO1Policy

        config = EO1Config(
            device="cpu", vlm_config=vlm.to_dict(), pretrained_path="tiny", chunk_size=HORIZON, n_action_steps=HORIZON,
            max_state_dim=4, max_action_dim=9, num_denoise_steps=2, dtype="float32", attn_implementation="eager",
            **_features(), **settings,
        )  # fmt: skip
        policy = EO1Policy(config).train()
    lasts = tuple(len(_sequence(words)) - _AFTER - 1 for words in _WORDS)
    return Head(
        policy=policy,
        make_batch=eo1_batch,
        source=SOURCE,
        blocks="model.vlm_backbone.model.language_model.layers",
        length=len(_sequence(max(_WORDS))),
        token=lasts,
        frames=FRAMES,
        padding="action_is_pad",
        optimizer=_optimizer,
        sample=eo1_sample,
    )
