"""The policies whose training step step_overhead.py measures: one function for each, which needs its host installed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEROBOT = ("groot", "pi0", "pi05", "smolvla", "multi_task_dit", "xvla", "vla_jepa")
WORDS = 48  # of an instruction, of full-size policies
VLM_GFLOP = 1450  # per sample: GR00T N1.6 with its VLM costs 1,600 to 2,000, of which its action head is the rest


@dataclass
class Host:
    """A policy and how to train it.

    Attributes:
        policy: in train mode.
        inputs: (batch size, pairs of frames [B, V, 2, 3, H, W] uint8 or None) -> the argument of its forward.
        layer: of attach_lara.
        size: shown in the table.
    """

    policy: nn.Module
    inputs: Callable[[int, Tensor | None], Any]
    layer: int = -3
    size: str = ""


def demo() -> Host:
    """The demo's policy, as `make demo` trains it."""
    from examples.mini_vla import MiniVLA

    policy = MiniVLA().train()
    config = policy.config

    def inputs(size: int, frames: Tensor | None) -> dict[str, Tensor]:
        batch = {
            "image": torch.randint(0, 256, (size, 3, config.image_size, config.image_size), dtype=torch.uint8),
            "state": torch.randn(size, config.state_dim),
            "task": torch.randint(0, config.num_tasks, (size,)),
            "action": torch.rand(size, config.horizon, config.action_dim) * 2 - 1,
            "action_mask": torch.ones(size, config.horizon, config.action_dim),
        }
        return batch if frames is None else {**batch, "lara_frames": frames}

    return Host(policy, inputs)


def lerobot(name: str) -> Host:
    """One of LeRobot's policies, its real classes at a tiny size (those of tests/hosts)."""
    from tests.helpers import lerobot_tiny

    def inputs(size: int, frames: Tensor | None) -> dict[str, Any]:
        batch = lerobot_tiny.make_batch(name, size, frames=False)
        return batch if frames is None else {**batch, lerobot_tiny.FRAMES: frames}

    return Host(lerobot_tiny.make_policy(name), inputs, layer=-1)


@dataclass(frozen=True)
class Full:
    """The size at which LeRobot's users train a policy.

    Attributes:
        pixels: of a camera frame.
        horizon: actions in a chunk.
        observations: steps of them that the policy sees; None: without an axis for them.
        settings: of the policy's configuration, beside these; what LeRobot's own defaults are.
        models: setting -> configuration of a pre-trained model that the policy builds by name.
    """

    pixels: int
    horizon: int
    observations: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Callable[[], Any]] = field(default_factory=dict)


def _smolvlm2_500m() -> Any:
    """The sizes of HuggingFaceTB/SmolVLM2-500M-Video-Instruct."""
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        image_token_id=49190,
        scale_factor=4,
        text_config={
            "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
            "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280,
        },
        vision_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16,
        },
    )  # fmt: skip


def _clip_b16() -> Any:
    """The sizes of openai/clip-vit-base-patch16: transformers' defaults except for the patches."""
    from transformers import CLIPConfig

    return CLIPConfig(vision_config={"patch_size": 16})


FULL = {
    "smolvla": Full(512, 50, settings={
        "resize_imgs_with_padding": (512, 512), "num_vlm_layers": 16, "max_state_dim": 32, "max_action_dim": 32,
    }, models={"vlm_model_name": _smolvlm2_500m}),
    "multi_task_dit": Full(224, 32, observations=2, settings={
        "hidden_dim": 512, "num_layers": 6, "num_heads": 8, "timestep_embed_dim": 256, "image_resize_shape": None,
        "image_crop_shape": (224, 224), "n_obs_steps": 2, "n_action_steps": 24,
    }, models={"vision_encoder_name": _clip_b16, "text_encoder_name": _clip_b16}),
    "xvla": Full(224, 32, settings={
        "hidden_size": 1024, "depth": 24, "num_heads": 16, "num_domains": 30, "len_soft_prompts": 32,
        "max_len_seq": 512, "max_state_dim": 32, "max_action_dim": 20,
    }),
}  # fmt: skip


def lerobot_full(name: str) -> Host:
    """One of LeRobot's policies at the size that its users train, without weights; X-VLA's Florence-2 is a stand-in."""
    from transformers import CLIPConfig, CLIPModel

    from tests.helpers import lerobot_tiny

    full = FULL[name]
    steps = {"horizon": full.horizon} if name == "multi_task_dit" else {"chunk_size": full.horizon}
    steps |= {} if "n_action_steps" in full.settings else {"n_action_steps": full.horizon}
    with tempfile.TemporaryDirectory(prefix="clip") as folder:  # LeRobot wants "clip" in the name of a CLIP
        models = {}
        for setting, config in full.models.items():
            models[setting] = str(Path(folder) / setting)
            made = config()
            (CLIPModel(made) if isinstance(made, CLIPConfig) else made).save_pretrained(models[setting])
        policy = lerobot_tiny.POLICIES[name].build(
            **lerobot_tiny.features(full.pixels), **full.settings, **steps, **models
        )

    def inputs(size: int, frames: Tensor | None) -> dict[str, Any]:
        batch = {
            **lerobot_tiny.vision_language_batch(size, full.pixels),
            "action": torch.randn(size, full.horizon, lerobot_tiny.ACTION),
            "action_is_pad": torch.zeros(size, full.horizon, dtype=torch.bool),
            "observation.language.tokens": torch.randint(8, 60, (size, WORDS)),
            "observation.language.attention_mask": torch.ones(size, WORDS, dtype=torch.bool),
        }
        if full.observations:
            for key in (lerobot_tiny.CAMERA, lerobot_tiny.STATE):
                batch[key] = torch.stack([batch[key]] * full.observations, dim=1)
        return batch if frames is None else {**batch, lerobot_tiny.FRAMES: frames}

    return Host(policy, inputs, layer=-1)


class Products(nn.Module):
    """Frozen matrix products that cost what a VLM would; of one pair of matrices, for memory's sake."""

    def __init__(self, gflop: float, tokens: int, width: int = 2048) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.mlp = nn.Sequential(nn.Linear(width, 8 * width), nn.GELU(), nn.Linear(8 * width, width))
        self.requires_grad_(False)
        self.repeats = round(gflop * 1e9 / (tokens * 2 * 2 * width * 8 * width))

    @torch.no_grad()
    def forward(self, batch: Tensor) -> None:
        """Do the work for as many samples as a batch [B, ...] has, where it is."""
        self.to(batch.device)  # it is not a part of the policy
        seen = torch.randn(len(batch), self.tokens, self.width, device=batch.device)
        for _ in range(self.repeats):
            seen = self.mlp(seen)


def gr00t_head(layers: int | None, tokens: int = 300, vlm_gflop: float = 0.0) -> Host:
    """GR00T N1.6 with its real action head at full size (32 blocks of width 1536, horizon 50) behind a stand-in VLM.

    Args:
        layers: blocks; None: all 32.
        tokens: length of the vision-language sequence that the head attends to.
        vlm_gflop: what the stand-in costs per sample.
    """
    from gr00t.configs.model.gr00t_n1d6 import Gr00tN1d6Config
    from gr00t.model.gr00t_n1d6.gr00t_n1d6 import Gr00tN1d6

    from examples import gr00t_tiny

    # the padding that GR00T-N1.6-3B's config.json is reported to have; the class's own defaults are 16 and 29
    config = Gr00tN1d6Config(action_horizon=50, max_action_dim=128, max_state_dim=128)
    if layers:
        config.diffusion_model_cfg = {**config.diffusion_model_cfg, "num_layers": layers}
    with gr00t_tiny.tiny_backbone():
        policy = Gr00tN1d6(config).train()
    if vlm_gflop:
        vlm = Products(vlm_gflop, tokens)
        policy.backbone.register_forward_pre_hook(lambda _, args: vlm(args[0]["input_ids"]))

    def inputs(size: int, frames: Tensor | None) -> dict[str, Any]:
        ids = torch.randint(0, gr00t_tiny.VOCABULARY, (size, tokens))
        ids[:, : tokens // 2] = policy.backbone.image_token_index
        mask = torch.zeros(size, config.action_horizon, config.max_action_dim)
        mask[:, :16, :7] = 1
        batch = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": [torch.rand(1, 3, 8, 8)] * size,
            "state": torch.randn(size, 1, config.max_state_dim), "action": torch.randn_like(mask), "action_mask": mask,
            "embodiment_id": torch.zeros(size, dtype=torch.long),
        }  # fmt: skip
        return batch if frames is None else {**batch, "lara_frames": frames}

    return Host(policy, inputs)


def build(name: str) -> Host:
    """A host by name: demo, lerobot:TYPE, lerobot-full:TYPE, gr00t, gr00t-head or gr00t-head:LAYERS.

    Raises:
        ValueError: the name is unknown.
        ImportError: its library is not installed.
    """
    kind, _, rest = name.partition(":")
    torch.manual_seed(0)
    if kind == "demo":
        host = demo()
    elif kind == "lerobot" and rest in LEROBOT:
        host = lerobot(rest)
    elif kind == "lerobot-full" and rest in FULL:
        host = lerobot_full(rest)
    elif kind == "gr00t":
        host = gr00t_head(None, vlm_gflop=VLM_GFLOP)
    elif kind == "gr00t-head":
        host = gr00t_head(int(rest) if rest else None)
    else:
        raise ValueError(
            f"unknown host {name!r}; expected demo, gr00t, gr00t-head[:LAYERS], lerobot:{{{','.join(LEROBOT)}}}, "
            f"lerobot-full:{{{','.join(FULL)}}}"
        )
    millions = sum(p.numel() for p in host.policy.parameters()) / 1e6
    host.size = f"{millions:.2f} M" if millions < 100 else f"{millions:.0f} M"
    return host
