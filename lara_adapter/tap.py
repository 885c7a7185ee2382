"""The module at which a hidden state of a policy's DiT is read.

`layer` counts as `hidden_states` does in transformers: [embeddings, after block 1, ..., after block L], so -3 is
"after block L-2" (LARA, Sec. 3; the official release's `all_hidden_states[-3]`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .blocks import Blocks, block_paths, blocks_name, submodule
from .errors import LaraArgumentError, TapNotFound
from .heads import find_blocks
from .policies import PolicySpec

__all__ = ["Tap", "absolute_layer", "resolve_tap"]


@dataclass(frozen=True)
class Tap:
    """Where one hidden state is read.

    Attributes:
        path: dotted path from the policy to the module that carries the hook.
        kind: "output": forward hook; "input": forward pre-hook.
        layer: absolute index into [embeddings, after block 1, ..., after block L].
        depth: number of blocks L.
        blocks: name of the blocks, see :mod:`lara_adapter.blocks`.
        width: width of the hidden state; None: unknown.
    """

    path: str
    kind: Literal["output", "input"]
    layer: int
    depth: int
    blocks: str
    width: int | None


def absolute_layer(layer: int | str, depth: int, where: str) -> int:
    """Turn -3, 30, "L" or "L-2" into an absolute index 0..depth.

    Raises:
        LaraArgumentError: not an integer and not of the form "L" or "L-k".
        TapNotFound: out of range.
    """
    if isinstance(layer, str):
        match = re.fullmatch(r"\s*L\s*(?:-\s*(\d+))?\s*", layer)
        if not match:
            raise LaraArgumentError(f"attach_lara: layer={layer!r}, but an integer, 'L' or 'L-2' is expected")
        index = depth - int(match[1] or 0)
    elif isinstance(layer, bool) or not isinstance(layer, int):
        raise LaraArgumentError(
            f"attach_lara: layer={layer!r} ({type(layer).__name__}), but an integer, 'L' or 'L-2' is expected"
        )
    else:
        index = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= index <= depth:
        raise TapNotFound(
            f"attach_lara: layer={layer}, but {where} has {depth} blocks; use 0..{depth} or {-depth - 1}..-1"
        )
    return index


def _width(block: nn.Module) -> int | None:
    """Width of a block's hidden state, from attributes: under DeepSpeed's zero.Init the shapes of weights are 0."""
    for name in ("dim", "hidden_size", "embed_dim", "d_model", "width"):
        value = getattr(block, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for part in block.modules():
        if isinstance(part, nn.MultiheadAttention):
            return part.embed_dim
        if isinstance(part, nn.LayerNorm) and len(part.normalized_shape) == 1:
            return int(part.normalized_shape[0])
        if isinstance(part, nn.Linear):
            return part.in_features
        if "norm" in type(part).__name__.lower():
            for name in ("dim", "hidden_size", "normalized_shape"):
                value = getattr(part, name, None)
                value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
                if isinstance(value, int):
                    return value
    return None


def resolve_tap(policy: nn.Module, layer: int | str, blocks: Blocks | None, spec: PolicySpec) -> Tap:
    """Find the module to hook for the state `layer` of the policy's DiT.

    Args:
        policy: the policy, unwrapped.
        layer: see the module docstring.
        blocks: name or modules of the blocks, see :func:`lara_adapter.blocks.blocks_name`; None: the spec's, else by
            structure.
        spec: the row of the policy table.

    Raises:
        TapNotFound: the path does not exist, is not a list of blocks, or `layer` is out of range.
        LaraArgumentError: `layer` is neither an integer nor "L"/"L-k", or `blocks` neither a name nor modules.
    """
    if blocks is None:
        name = spec.blocks or find_blocks(policy)
    else:
        name = blocks_name(policy, blocks)
    paths = block_paths(policy, name)
    depth = len(paths)
    index = absolute_layer(layer, depth, name or type(policy).__name__)
    before = paths[max(index, 1) - 1]
    width = _width(policy.get_submodule(before))
    if spec.tap == "output":
        return Tap(before, "output" if index else "input", index, depth, name, width)
    norm = str(spec.final_norm) if index == depth else f"{paths[index]}.{spec.norm}"
    submodule(policy, norm, "norm")
    return Tap(norm, "input", index, depth, name, width)
