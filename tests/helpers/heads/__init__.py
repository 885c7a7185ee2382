"""Real action heads of other projects, built tiny: see :class:`Head`. The checkouts are found by LARA_HEADS_SRC."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .common import ACTION, FRAMES, HORIZON, SIZE, Head, Recorder, actions_of, changes, first, move, parts, with_frames

__all__ = [
    "ACTION", "FRAMES", "HEADS", "HORIZON", "SIZE", "Head", "Recorder", "actions_of", "build", "changes", "first", "move",
    "parts", "with_frames",
]  # fmt: skip

# name -> module, function, its arguments
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cogact": ("cogact", "build", {}),
    "cogact_ema": ("cogact", "build", {"use_ema": True}),
    "rdt": ("rdt", "build", {}),
    "starvla_groot": ("starvla", "build_groot", {}),
    "starvla_pi": ("starvla", "build_pi", {}),
    "diffusion_policy": ("diffusion_policy", "build", {}),
    "diffusion_policy_bert": ("diffusion_policy", "build", {"bert": True}),
    "diffusion_policy_cond": ("diffusion_policy", "build", {"n_cond_layers": 2}),
    "diffusion_policy_image": ("diffusion_policy", "build_image", {}),
    "flower": ("flower", "build", {}),
    "mdt_v": ("mdt", "build", {}),
    "dexvla_scaledp": ("dexvla", "build", {}),
    "dexvla": ("dexvla", "build_vla", {}),
    "evo1": ("lerobot_main", "build_evo1", {}),
    "eo1": ("lerobot_main", "build_eo1", {}),
}


@functools.lru_cache(maxsize=len(HEADS))
def build(name: str) -> Head:
    """A head of :data:`HEADS`; always the same weights. Its policy is shared: take a deep copy to attach to."""
    module, function, arguments = HEADS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(**arguments)
