"""The policies whose training step benchmarks/step_overhead.py measures: a function each, that needs its host installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
LEROBOT = ("groot", "pi0", "pi05", "smolvla", "multi_task_dit", "xvla", "vla_jepa")


@dataclass
class Host:
    """A policy and how to train it.

    Attributes:
        policy: in train mode.
        inputs: (batch size, pairs of frames [B, V, 2, 3, H, W] uint8 or None) -> the argument of its forward.
        layer: of attach_lara.
        size: said in the table.
    """

    policy: nn.Module
    inputs: Callable[[int, Tensor | None], Any]
    layer: int = -3
    size: str = ""


def demo() -> Host:
    """The demo's policy, as `make demo` trains it."""
    sys.path.insert(0, str(ROOT / "examples"))
    from mini_vla import MiniVLA

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
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "hosts")]
    import lerobot_tiny

    def inputs(size: int, frames: Tensor | None) -> dict[str, Any]:
        batch = lerobot_tiny.make_batch(name, size, frames=False)
        return batch if frames is None else {**batch, lerobot_tiny.FRAMES: frames}

    return Host(lerobot_tiny.make_policy(name), inputs, layer=-1)


def gr00t_head(layers: int | None, tokens: int = 300) -> Host:
    """GR00T N1.6 with its real action head at full size (32 blocks of width 1536, horizon 50) behind a stand-in VLM.

    Args:
        layers: blocks; None: all 32.
        tokens: length of the vision-language sequence that the head attends to.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    import gr00t_tiny
    from gr00t.configs.model.gr00t_n1d6 import Gr00tN1d6Config
    from gr00t.model.gr00t_n1d6.gr00t_n1d6 import Gr00tN1d6

    # the padding that GR00T-N1.6-3B's config.json is reported to have; the class's own defaults are 16 and 29
    config = Gr00tN1d6Config(action_horizon=50, max_action_dim=128, max_state_dim=128)
    if layers:
        config.diffusion_model_cfg = {**config.diffusion_model_cfg, "num_layers": layers}
    with gr00t_tiny.tiny_backbone():
        policy = Gr00tN1d6(config).train()

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
    """A host by name: demo, lerobot:TYPE, gr00t-head or gr00t-head:LAYERS.

    Raises:
        ValueError: there is none of that name.
        ImportError: its library is not installed.
    """
    kind, _, rest = name.partition(":")
    torch.manual_seed(0)
    if kind == "demo":
        host = demo()
    elif kind == "lerobot" and rest in LEROBOT:
        host = lerobot(rest)
    elif kind == "gr00t-head":
        host = gr00t_head(int(rest) if rest else None)
    else:
        raise ValueError(f"no host {name!r}; there is demo, gr00t-head[:LAYERS], lerobot:{{{','.join(LEROBOT)}}}")
    millions = sum(p.numel() for p in host.policy.parameters()) / 1e6
    host.size = f"{millions:.2f} M" if millions < 100 else f"{millions:.0f} M"
    return host
