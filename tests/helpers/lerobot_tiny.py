"""Tiny builds of LeRobot's real policies, without weights and without the Hub.

What is tiny is the configuration; where LeRobot hard-codes a size or a download, that one name is replaced while the
policy is built and put back after it, so that the builds cannot leak into each other or into LeRobot.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from torch import nn

from .toys import SIZE

CAMERA, STATE, FRAMES = "observation.images.cam", "observation.state", "observation.lara.frames"
HORIZON, ACTION = 8, 3


@dataclass(frozen=True)
class Tiny:
    """One policy.

    Attributes:
        build: makes it, in train mode; keyword arguments go to its configuration.
        batch: makes a training batch of a given size, as LeRobot's preprocessor hands it to the policy.
        head: dotted path of the layers that read the last block.
        offset: position of the first action token in the sequence of the action head.
        draws: noise draws of each sample in one batch.
        lora: pattern of the modules that get LoRA; None: LeRobot has defaults of its own.
    """

    build: Callable[..., nn.Module]
    batch: Callable[[int], dict[str, Any]]
    head: str
    offset: int
    draws: int = 1
    lora: str | None = None


def features(pixels: int) -> dict[str, dict[str, PolicyFeature]]:
    return {
        "input_features": {
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, pixels, pixels)),
            STATE: PolicyFeature(FeatureType.STATE, (4,)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
    }


def vision_language_batch(size: int, pixels: int) -> dict[str, Any]:
    return {
        CAMERA: torch.rand(size, 3, pixels, pixels),
        STATE: torch.randn(size, 4),
        "action": torch.randn(size, HORIZON, ACTION),
        "action_is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
        "observation.language.tokens": torch.randint(8, 60, (size, 7)),
        "observation.language.attention_mask": torch.ones(size, 7, dtype=torch.bool),
    }


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


# ---------------------------------------------------------------------- GR00T N1.7: real Qwen3-VL and action head


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    return Qwen3VLConfig(
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 256,
            "tie_word_embeddings": True, "rope_parameters": rope,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "in_channels": 3, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip


# heads x head width must be input_embedding_dim, the transformer's output_dim hidden_size
_GROOT_HEAD = {
    "backbone_embedding_dim": 32, "select_layer": 2, "hidden_size": 24, "input_embedding_dim": 32, "max_state_dim": 6,
    "max_action_dim": 5, "action_horizon": HORIZON, "max_seq_len": 64, "max_num_embodiments": 32,
    "diffusion_model_cfg": {
        "positional_embeddings": None, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 8,
        "norm_type": "ada_norm", "dropout": 0.2, "final_dropout": True, "output_dim": 24,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        "positional_embeddings": None, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8,
        "dropout": 0.2, "final_dropout": True,
    },
}  # fmt: skip


def build_groot(**settings: Any) -> nn.Module:
    import lerobot.policies.groot.groot_n1_7 as n1_7
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    def without_weights(cls: type, *args: Any, **kwargs: Any) -> nn.Module:
        return n1_7.GR00TN17(n1_7.GR00TN17Config(**_GROOT_HEAD), load_backbone_weights=False)

    config = GrootConfig(
        **{"device": "cpu", "chunk_size": HORIZON, "n_action_steps": HORIZON, "max_state_dim": 6, "max_action_dim": 5},
        **features(32),
        **settings,
    )
    with replaced(
        (n1_7, "_cosmos_reason2_qwen3_vl_config", _qwen3_vl),
        (n1_7.GR00TN17, "from_pretrained", classmethod(without_weights)),
    ):
        return GrootPolicy(config).train()


def groot_batch(size: int) -> dict[str, Any]:
    ids = torch.tensor([[3, 1, 4, 10, 11, 12]] * size)  # one image of 4 patches is one image token
    mask = torch.zeros(size, HORIZON, 5)
    mask[:, :, :ACTION] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(size * 4, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * size),
        "state": torch.randn(size, 1, 6),
        "action": torch.randn(size, HORIZON, 5),
        "action_mask": mask,
        "embodiment_id": torch.zeros(size, dtype=torch.int32),
    }


# ---------------------------------------------------------------------- pi0, pi0.5: real PaliGemma and Gemma expert

_WIDTH, _VLM_WIDTH, _VOCABULARY = 32, 48, 64


def _build_pi(module: Any, policy: type, config: type, **settings: Any) -> nn.Module:
    def gemma(variant: str) -> Any:
        # 8 heads and 1 key-value head are hard-coded in the joint attention
        width = _WIDTH if variant == "gemma_300m" else _VLM_WIDTH
        return module.GemmaConfig(width=width, depth=3, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=8)

    def paligemma() -> Any:
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "patch_size": 14, "image_size": 28, "vision_use_head": False,
        }  # fmt: skip
        return mapping["paligemma"](vision_config=vision)

    mapping = module.CONFIG_MAPPING
    sizes = {"chunk_size": HORIZON, "n_action_steps": HORIZON, "max_state_dim": 6, "max_action_dim": 5}
    built = config(**{"device": "cpu", "image_resolution": (28, 28), **sizes, **features(28), **settings})
    with replaced(
        (module, "get_gemma_config", gemma),
        (module, "CONFIG_MAPPING", {"paligemma": paligemma, "gemma": mapping["gemma"]}),
    ):
        made = policy(built)
    joint = made.model.paligemma_with_expert
    # hard-coded: the width behind the image encoder, and a vocabulary of 257152 that would be 99% of the parameters
    joint.paligemma.model.multi_modal_projector.linear = nn.Linear(16, _VLM_WIDTH)
    embedding, heads = joint.paligemma.model.language_model.embed_tokens, (joint.paligemma.lm_head,)
    tied = heads[0].weight is embedding.weight
    embedding.weight, embedding.num_embeddings = nn.Parameter(embedding.weight.detach()[:_VOCABULARY].clone()), 64
    for head in (*heads, joint.gemma_expert.lm_head):
        head.weight = nn.Parameter(head.weight.detach()[:_VOCABULARY].clone())
    if tied:
        heads[0].weight = embedding.weight
    return made.train()


def build_pi0(**settings: Any) -> nn.Module:
    import lerobot.policies.pi0.modeling_pi0 as module
    from lerobot.policies.pi0.configuration_pi0 import PI0Config

    return _build_pi(module, module.PI0Policy, PI0Config, **settings)


def build_pi05(**settings: Any) -> nn.Module:
    import lerobot.policies.pi05.modeling_pi05 as module
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    return _build_pi(module, module.PI05Policy, PI05Config, **settings)


# ---------------------------------------------------------------------- SmolVLA: real SmolVLM, its processor stubbed


@functools.lru_cache(maxsize=1)
def _scratch() -> str:
    folder = tempfile.TemporaryDirectory(prefix="lerobot_tiny_")
    _KEPT.append(folder)  # removed when the process ends
    return folder.name


_KEPT: list[tempfile.TemporaryDirectory] = []


@functools.lru_cache(maxsize=1)
def _smolvlm_folder() -> str:
    from transformers import SmolVLMConfig

    folder = os.path.join(_scratch(), "tiny-smolvlm")
    SmolVLMConfig(
        image_token_id=5,
        scale_factor=2,
        pad_token_id=0,
        text_config={
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
            "max_position_embeddings": 256, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8,
        },
    ).save_pretrained(folder)  # fmt: skip
    return folder


class _TwoTokens:
    """All that SmolVLA reads of its processor."""

    tokenizer = SimpleNamespace(fake_image_token_id=6, global_image_token_id=7)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> type:
        return cls


def build_smolvla(**settings: Any) -> nn.Module:
    import lerobot.policies.smolvla.smolvlm_with_expert as module
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    sizes = {"chunk_size": HORIZON, "n_action_steps": HORIZON, "max_state_dim": 6, "max_action_dim": 5}
    vlm = {"num_vlm_layers": 4, "vlm_model_name": _smolvlm_folder(), "load_vlm_weights": False}
    config = SmolVLAConfig(
        **{"device": "cpu", "resize_imgs_with_padding": (32, 32), **sizes, **vlm, **features(32), **settings}
    )
    with replaced((module, "AutoProcessor", _TwoTokens)):
        return SmolVLAPolicy(config).train()


# ---------------------------------------------------------------------- Multi-Task DiT: a CLIP folder of its own


@functools.lru_cache(maxsize=1)
def clip_folder() -> str:
    """A tiny CLIP with its tokenizer, so that the real preprocessor runs too; LeRobot wants "clip" in the name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = os.path.join(_scratch(), "tiny-clip")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(projection_dim=16, text_config={**layers, **text}, vision_config={**layers, **vision})
    CLIPModel(config).save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "push", "the", "block"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


def build_multi_task_dit(**settings: Any) -> nn.Module:
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    sizes = {"hidden_dim": 32, "num_layers": 3, "num_heads": 4, "timestep_embed_dim": 16}
    steps = {"objective": "flow_matching", "n_obs_steps": 1, "horizon": HORIZON, "n_action_steps": HORIZON}
    clip = {"vision_encoder_name": clip_folder(), "text_encoder_name": clip_folder()}
    images = {"image_resize_shape": (32, 32), "image_crop_shape": None}
    config = MultiTaskDiTConfig(**{"device": "cpu", **sizes, **steps, **clip, **images, **features(32), **settings})
    policy = MultiTaskDiTPolicy(config).train()
    # its modulation is zero at first, so that every block is the identity and passes no gradient to its attention
    with torch.no_grad():
        for block in policy.noise_predictor.transformer_blocks:
            nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.1)
            nn.init.normal_(block.adaLN_modulation[-1].bias, std=0.1)
    return policy


def multi_task_dit_batch(size: int) -> dict[str, Any]:
    batch = vision_language_batch(size, 32)
    return {**batch, CAMERA: batch[CAMERA][:, None], STATE: batch[STATE][:, None]}  # a time axis of n_obs_steps


# ---------------------------------------------------------------------- X-VLA: real soft-prompted transformer


class _Florence(nn.Module):
    """In place of Florence-2: what X-VLA calls of it, with weights that train."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.vision_config.projection_dim
        self.patches, self.words = nn.Conv2d(3, width, 16, 16), nn.Embedding(_VOCABULARY, width)
        self.language_model = nn.Module()
        self.language_model.decoder = nn.Identity()
        self.language_model.encoder = _FlorenceEncoder(width)

    def get_image_features(self, images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=self.patches(images).flatten(2).mT)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


class _FlorenceEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.mix(inputs_embeds),)


def build_xvla(**settings: Any) -> nn.Module:
    import lerobot.policies.xvla.modeling_xvla as module
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig

    sizes = {"hidden_size": 32, "depth": 3, "num_heads": 4, "num_domains": 3, "len_soft_prompts": 4, "max_len_seq": 64}
    steps = {"chunk_size": HORIZON, "n_action_steps": HORIZON}
    actions = {"action_mode": "auto", "max_state_dim": 6, "max_action_dim": 5}
    config = XVLAConfig(**{"device": "cpu", **sizes, **steps, **actions, **features(32), **settings})
    florence = SimpleNamespace(vision_config=SimpleNamespace(projection_dim=16))
    with replaced((module, "Florence2Model", _Florence), (XVLAConfig, "get_florence_config", lambda self: florence)):
        return module.XVLAPolicy(config).train()


# ---------------------------------------------------------------------- VLA-JEPA: real action head and video predictor

_QWEN_WIDTH = 24


class _Qwen(nn.Module):
    """In place of LeRobot's Qwen3-VL interface: one linear layer over word embeddings and the mean colour."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = _QwenModel()
        self._action_tokens = [config.special_action_token.format(i) for i in range(4 * config.chunk_size)]
        self._embodied_token = config.embodied_action_token

    @staticmethod
    def _get_torch_dtype(name: str) -> torch.dtype:
        return getattr(torch, name)

    @staticmethod
    def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
        return images.detach().float()

    def expand_tokenizer(self) -> tuple[list[str], list[int], int]:
        return self._action_tokens, list(range(1, 1 + len(self._action_tokens))), 0

    def build_inputs(
        self, images: list, instructions: list[str], action_prompt: str, embodied_prompt: str
    ) -> dict[str, torch.Tensor]:
        actions = sum(map(action_prompt.count, self._action_tokens))
        row = [40, *[1] * actions, *[0] * embodied_prompt.count(self._embodied_token)]
        colour = torch.stack([torch.stack(views).mean((0, 2, 3)) for views in images])
        return {"input_ids": torch.tensor([row] * len(images)), "colour": colour}


class _QwenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=_QWEN_WIDTH)
        self.words, self.colour = nn.Embedding(_VOCABULARY, _QWEN_WIDTH), nn.Linear(3, _QWEN_WIDTH)
        self.model = nn.Module()
        self.model.language_model = nn.Module()
        self.model.language_model.layers = nn.ModuleList([_Residual(_QWEN_WIDTH)])

    def forward(self, input_ids: torch.Tensor, colour: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embedded = self.words(input_ids) + self.colour(colour)[:, None]
        return self.model.language_model.layers[0](embedded)


class _Residual(nn.Linear):
    """Its sum is float32 under autocast too: the action head takes nothing else on a CPU."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class _VideoEncoder(nn.Module):
    """In place of V-JEPA 2: a mean over two frames and 16 x 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tubelet_size=2, hidden_size=24, image_size=32)
        self.patches = nn.Conv3d(3, 24, (2, 16, 16), (2, 16, 16))
        self.device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> nn.Module:
        return cls().requires_grad_(False)

    def get_vision_features(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        return self.patches(pixel_values_videos.transpose(1, 2)).flatten(2).mT


class _VideoProcessor:
    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> _VideoProcessor:
        return cls()

    def __call__(self, videos: list[torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": torch.stack(videos)}


def build_vla_jepa(**settings: Any) -> nn.Module:
    import lerobot.policies.vla_jepa.modeling_vla_jepa as module
    from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig

    steps = {"chunk_size": HORIZON, "n_action_steps": HORIZON, "num_video_frames": 4}
    tokens = {"num_action_tokens_per_timestep": 2, "num_embodied_action_tokens_per_instruction": 4}
    head = {"action_model_type": "DiT-test", "action_hidden_size": 16, "action_num_layers": 3}
    video = {"predictor_depth": 1, "predictor_num_heads": 2, "torch_dtype": "float32"}
    config = VLAJEPAConfig(**{"device": "cpu", **steps, **tokens, **head, **video, **features(32), **settings})
    with replaced(
        (module, "Qwen3VLInterface", _Qwen),
        (module, "AutoModel", _VideoEncoder),
        (module, "AutoVideoProcessor", _VideoProcessor),
    ):
        return module.VLAJEPAPolicy(config).train()


def vla_jepa_batch(size: int) -> dict[str, Any]:
    batch = vision_language_batch(size, 32)
    return {**batch, CAMERA: torch.rand(size, 4, 3, 32, 32), "task": ["push the block"] * size}


# ---------------------------------------------------------------------- all of them

_ATTENTION = r".*transformer_blocks\.\d+\.attn1\.to_[qv]"
_MLP = r".*blocks\.\d+\.mlp\.(0|fc1)"

POLICIES: dict[str, Tiny] = {
    "groot": Tiny(build_groot, groot_batch, "_groot_model.action_head.action_decoder", offset=1, lora=_ATTENTION),
    "pi0": Tiny(build_pi0, lambda size: vision_language_batch(size, 28), "model.action_out_proj", offset=1),
    "pi05": Tiny(build_pi05, lambda size: vision_language_batch(size, 28), "model.action_out_proj", offset=0),
    "smolvla": Tiny(build_smolvla, lambda size: vision_language_batch(size, 32), "model.action_out_proj", offset=0),
    "multi_task_dit": Tiny(
        build_multi_task_dit, multi_task_dit_batch, "noise_predictor.output_proj", offset=0, lora=_MLP
    ),
    "xvla": Tiny(
        build_xvla,
        lambda size: vision_language_batch(size, 32),
        "model.transformer.action_decoder",
        offset=0,
        lora=_MLP,
    ),
    "vla_jepa": Tiny(
        build_vla_jepa, vla_jepa_batch, "model.action_model.action_decoder", offset=1 + 4, draws=8, lora=_ATTENTION
    ),
}


@functools.lru_cache(maxsize=len(POLICIES))
def _prototype(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return POLICIES[name].build()


def make_policy(name: str, **settings: Any) -> nn.Module:
    """A policy of its own, in train mode; always the same weights."""
    if not settings:
        return copy.deepcopy(_prototype(name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return POLICIES[name].build(**settings)


def make_batch(name: str, size: int = 2, frames: bool = True, seed: int = 0) -> dict[str, Any]:
    """A training batch of the policy, with LARA's pair of frames under the key that LeRobot keeps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = POLICIES[name].batch(size)
        if frames:
            batch[FRAMES] = torch.randint(0, 256, (size, 2, 3, SIZE, SIZE), dtype=torch.uint8)
    return batch
