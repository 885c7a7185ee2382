"""Real action heads of other projects, built tiny: see :class:`Head`. None of their code is here.

The folder that LARA_HEADS_SRC names holds a checkout of each, under these names; on CUDA machines too, all runs on the CPU:

    CogACT            github.com/microsoft/CogACT                      b174a1b
    RDT               github.com/thu-ml/RoboticsDiffusionTransformer   deb71d8
    diffusion_policy  github.com/real-stanford/diffusion_policy        5ba07ac
    starVLA           github.com/starVLA/starVLA                       0ed0aad
    flower            github.com/intuitive-robots/flower_vla_calvin    acb32ee
    mdt               github.com/intuitive-robots/mdt_policy           e7a78e7
    DexVLA            github.com/juruobenruo/DexVLA                    fc21a82
    lerobot           github.com/huggingface/lerobot                   7427f31
"""

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
    "starvla_cosmos": ("starvla", "build_groot", {"name": "CosmosGR00T", "class_name": "Cosmos_GR00T"}),
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
