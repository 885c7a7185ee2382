"""Find the DiT blocks of a policy, and the module at which a hidden state is read.

`layer` counts as `hidden_states` does in transformers: [embeddings, after block 1, ..., after block L], so -3 is
"after block L-2" (LARA, Sec. 3; the official release's `all_hidden_states[-3]`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .errors import LaraArgumentError, TapNotFound
from .policies import PolicySpec

__all__ = ["Tap", "absolute_layer", "block_candidates", "find_blocks", "first_tensor", "resolve_tap"]

# names of action heads, to choose among several candidates
_HEAD_WORDS = re.compile(r"action|dit|diffus|denois|expert|flow|noise", re.IGNORECASE)
_ATTENTION_WORD = re.compile(r"att", re.IGNORECASE)


@dataclass(frozen=True)
class Tap:
    """Where one hidden state is read.

    Attributes:
        path: dotted path from the policy to the module that carries the hook.
        kind: "output": forward hook; "input": forward pre-hook.
        layer: absolute index into [embeddings, after block 1, ..., after block L].
        depth: number of blocks L.
        blocks: dotted path of the blocks.
        width: width of the hidden state; None: unknown.
    """

    path: str
    kind: Literal["output", "input"]
    layer: int
    depth: int
    blocks: str
    width: int | None


def first_tensor(value: Any) -> torch.Tensor | None:
    """The value itself, or the first tensor of a tuple, list or mapping; None if there is none."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            if isinstance(item, torch.Tensor):
                return item
    return None


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


def _is_block_list(module: nn.Module) -> bool:
    """Two or more modules of one class, each with an attention inside."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return False
    if len({type(block) for block in module}) != 1:
        return False
    return any(
        isinstance(part, nn.MultiheadAttention) or _ATTENTION_WORD.search(f"{name} {type(part).__name__}")
        for name, part in module[0].named_modules()
        if name
    )


def block_candidates(policy: nn.Module) -> list[tuple[str, nn.Module]]:
    """Dotted path and module of each outermost list of two or more blocks of one class that contain an attention."""
    candidates: list[tuple[str, nn.Module]] = []
    for path, module in policy.named_modules():
        nested = any(path == known or path.startswith(known + ".") for known, _ in candidates)
        if not nested and _is_block_list(module):
            candidates.append((path, module))
    return candidates


def find_blocks(policy: nn.Module) -> str:
    """Dotted path of the action head's blocks, by structure.

    Of several candidates (:func:`block_candidates`), the one whose path or owner's class names an action head (action, dit,
    diffusion, denoise, expert, flow, noise) is taken, if it is the only one.

    Raises:
        TapNotFound: no candidate, or several; the message lists them.
    """
    candidates = block_candidates(policy)
    if not candidates:
        raise TapNotFound(
            f"attach_lara: no list of attention blocks found in {type(policy).__name__}; "
            "pass blocks='dotted.path.to.the.blocks' of its diffusion transformer"
        )
    heads = candidates
    if len(heads) > 1:
        owners = {path: type(policy.get_submodule(path.rpartition(".")[0])).__name__ for path, _ in candidates}
        heads = [c for c in candidates if _HEAD_WORDS.search(f"{c[0]} {owners[c[0]]}")]
    if len(heads) == 1:
        return heads[0][0]
    listed = "; ".join(f"{p} ({len(m)} x {type(m[0]).__name__})" for p, m in (heads or candidates))  # type: ignore[arg-type,index]
    raise TapNotFound(
        f"attach_lara: {type(policy).__name__} has several lists of attention blocks: {listed}. "
        "Say which is the diffusion transformer: blocks='...'"
    )


def _path_of(policy: nn.Module, blocks: nn.Module) -> str:
    for path, module in policy.named_modules(remove_duplicate=False):
        if module is blocks:
            return path
    raise TapNotFound("attach_lara: blocks= is a module that is not part of the policy; pass one that is, or its path")


def _submodule(policy: nn.Module, path: str, argument: str) -> nn.Module:
    try:
        return policy.get_submodule(path)
    except AttributeError:
        known, rest = policy, path.split(".")
        done: list[str] = []
        while rest and isinstance(getattr(known, rest[0], None), nn.Module):
            known = getattr(known, rest[0])
            done.append(rest.pop(0))
        children = sorted(name for name, _ in known.named_children())[:20]
        raise TapNotFound(
            f"attach_lara: {argument}={path!r}, but {'.'.join(done) or type(policy).__name__} has no {rest[0]!r}; "
            f"it has {children}"
        ) from None


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


def resolve_tap(policy: nn.Module, layer: int | str, blocks: str | nn.Module | None, spec: PolicySpec) -> Tap:
    """Find the module to hook for the state `layer` of the policy's DiT.

    Args:
        policy: the policy, unwrapped.
        layer: see the module docstring.
        blocks: dotted path or module list; None: the spec's, else by structure.
        spec: the row of the policy table.

    Raises:
        TapNotFound: the path does not exist, is not a list of blocks, or `layer` is out of range.
        LaraArgumentError: `layer` is neither an integer nor "L"/"L-k".
    """
    if blocks is None:
        path = spec.blocks or find_blocks(policy)
    else:
        path = blocks if isinstance(blocks, str) else _path_of(policy, blocks)
    module = _submodule(policy, path, "blocks")
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) == 0:
        lists = [f"{path}.{n}" if path else n for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and n]
        raise TapNotFound(
            f"attach_lara: blocks={path!r} is a {type(module).__name__}, but a ModuleList of blocks is expected"
            + (f"; inside it: {lists[:5]}" if lists else "")
        )
    depth = len(module)
    index = absolute_layer(layer, depth, path or type(policy).__name__)
    width = _width(module[max(index, 1) - 1])
    if spec.tap == "output":
        block = f"{path}.{max(index, 1) - 1}".lstrip(".")
        return Tap(block, "output" if index else "input", index, depth, path, width)
    if index == depth:
        norm = str(spec.final_norm)
    else:
        norm = f"{path}.{index}.{spec.norm}"
    _submodule(policy, norm, "norm")
    return Tap(norm, "input", index, depth, path, width)
