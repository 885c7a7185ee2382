"""Write projector and latent action model of the official joint training as a saved adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..config import LaraConfig
from ..errors import AdapterFormatError
from ..lam import checkpoint
from ..lam.config import LatentActionConfig
from ..metrics import History
from ..saving.card import Facts
from ..saving.layout import LAM_FOLDER, TOP_LEVEL, WEIGHTS_FILE
from ..saving.read import COUNTERS
from ..saving.write import finish
from ..storage.files import replace_folder, write_tensors
from .reading import Model

__all__ = ["write_adapter"]


def write_adapter(folder: Path, model: Model, config: LatentActionConfig, state: dict[str, Tensor]) -> None:
    """Write a policy's projector and latent action model (`config`, `state`) for :func:`lara_adapter.load_lara`.

    Raises:
        AdapterFormatError: the checkpoint has no projector that reads a block's output, or its settings do not fit it.
    """
    place, weights = model.place, model.weights
    if place is None or weights is None or model.policy is None:
        raise AdapterFormatError("this latent action model was not read from a policy's checkpoint")
    policy, policy_path = model.policy
    if len(place.projector) != 2 or not place.depth:
        raise AdapterFormatError(
            f"{weights.path} has no projector that reads the output of transformer_blocks ({place.blocks}, "
            f"{place.projector}); only the latent action model can be converted, without --adapter"
        )
    head = policy.get("action_head_cfg", {})
    if not isinstance(head, dict):
        raise AdapterFormatError(f"{policy_path}: action_head_cfg={head!r}, but a mapping is expected")
    tensors = weights.read(place.projector)
    weight, bias = (tensors[name] for name in place.projector)
    width = config.queries * config.latent_dim
    if weight.ndim != 2 or weight.shape[0] != width or bias.shape != (width,):
        raise AdapterFormatError(
            f"{weights.path}: {place.projector[0]} has shape {list(weight.shape)} and the bias {list(bias.shape)}, but "
            f"[{width}, hidden width] and [{width}] are expected"
        )
    index = head.get("latent_motion_hidden_layer", -3)
    if isinstance(index, bool) or not isinstance(index, int) or not -place.depth - 1 <= index <= place.depth:
        raise AdapterFormatError(
            f"{policy_path}: latent_motion_hidden_layer={index!r}, but an index into {place.depth + 1} hidden "
            "states is expected"
        )
    layer = index if index >= 0 else place.depth + 1 + index
    if layer == 0:
        raise AdapterFormatError(
            f"{policy_path}: latent_motion_hidden_layer={index} is the embedding, before any block"
        )
    tuned = head.get("tune_latent_motion_tokenizer", True)
    if not isinstance(tuned, bool):
        raise AdapterFormatError(
            f"{policy_path}: tune_latent_motion_tokenizer={tuned!r}, but true or false is expected"
        )
    architectures = policy.get("architectures")
    lara = LaraConfig(
        layer=layer, depth=place.depth, blocks=place.blocks, tap=f"{place.blocks}.{layer - 1}", tap_kind="output",
        hidden_width=weight.shape[1], latent_width=width, token="last", projector="linear",
        align_weight=_number(head, "latent_loss_weight", policy_path),
        lam_weight=_number(head, "tokenizer_vae_loss_weight", policy_path), train_lam=tuned,
        policy_class=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        lara_version=__version__,
    )  # fmt: skip
    tensors = {"projector.weight": weight, "projector.bias": bias}
    tensors |= zip(COUNTERS, (torch.zeros((), dtype=torch.long), torch.zeros(width), torch.tensor(0)))
    with replace_folder(folder, ours=TOP_LEVEL) as fresh:
        write_tensors(fresh / WEIGHTS_FILE, tensors)
        checkpoint.write(fresh / LAM_FOLDER, config, state)
        finish(fresh, folder, Facts(lara, metrics={}, steps=0), History())


def _number(head: dict[str, Any], name: str, path: Path) -> float:
    value = head.get(name, 0.01)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFormatError(f"{path}: {name}={value!r}, but a number is expected")
    return float(value)
