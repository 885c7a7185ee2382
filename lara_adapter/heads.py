"""Which list of blocks is the action head's: found by structure, told by names.

A policy has other transformers beside its action head: encoders of images and instructions, a language model, copies
(EMA, teacher). A name counts by its whole parts, in snake_case or camelCase, so that "condition" does not contain a DiT.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import nn

from .blocks import block_paths, named_lists
from .errors import TapNotFound

__all__ = ["Candidate", "block_candidates", "doubt", "find_blocks"]

_HEAD = re.compile(r"actions?|dit|mmdit|udit|rdt|mdt|diffus\w*|denois\w*|expert|flow|flowmatching|noise|velocity")
# an identifier that ends with one of these is not an action head: action_encoder, noise_tokenizer
_ROLE = re.compile(
    r"(?:auto)?encoders?|vae|(?:de)?tokenizers?|towers?|featurizers?|extractors?|resampler|perceiver|qformer"
)
_VISION = re.compile(r"vision|visual|images?|img|video|vit|siglip|clip|dinov?")
_LANGUAGE = re.compile(r"text|language|lang|l?lm|vlm?|bert|gemma|paligemma|llama|qwen|florence|eagle")
_TOWER = re.compile(f"{_VISION.pattern}|{_LANGUAGE.pattern}")
_COPY = re.compile(r"ema|teacher|target|momentum|shadow|averaged|swa")
_COPY_CLASS = re.compile(r"ema|teacher|averaged|swa")
_CASED = {"DiT": "Dit", "ViT": "Vit", "SigLIP": "Siglip"}
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")

_ATTENTION = re.compile(r"att", re.IGNORECASE)
_LISTED = 8  # candidates in a message


class Candidate(NamedTuple):
    """A list of attention blocks.

    Attributes:
        path: its name, see :mod:`lara_adapter.blocks`.
        blocks: its modules.
        kind: "head": its name says action head. "apart": its name says encoder, language model or copy.
            None: neither.
    """

    path: str
    blocks: list[nn.Module]
    kind: Literal["head", "apart"] | None

    def __str__(self) -> str:
        return f"{self.path} ({len(self.blocks)} x {type(self.blocks[0]).__name__})"


def block_candidates(policy: nn.Module) -> list[Candidate]:
    """Each outermost list of two or more blocks of one class that contain an attention.

    A list is a ModuleList, Sequential, ModuleDict, or numbered attributes. A list of whole networks (two encoders, one
    head per robot) is not a list of blocks: those inside it count.
    """
    candidates: list[Candidate] = []
    inside: list[str] = []
    for path, blocks in named_lists(policy):
        nested = any(known in ("", path) or path.startswith(f"{known}.") for known in inside)
        parts = path.endswith("*") and bool(blocks) and _is_attention(blocks[0])  # attn1 and attn2 of one block
        if not nested and not parts and _are_blocks(blocks) and not _is_network(blocks[0]):
            candidates.append(Candidate(path, blocks, _kind(policy, path, blocks)))
            inside += block_paths(policy, path) if path.endswith("*") else [path]
    return candidates


def find_blocks(policy: nn.Module) -> str:
    """Name of the action head's blocks: the only candidate called so, else the only one that is not called otherwise.

    Raises:
        TapNotFound: none, or several; the message lists them.
    """
    name, candidates = type(policy).__name__, block_candidates(policy)
    if not candidates:
        raise TapNotFound(
            f"attach_lara: no list of attention blocks found in {name}; "
            "pass blocks='dotted.path.to.the.blocks' of its diffusion transformer"
        )
    remaining = [c for c in candidates if c.kind == "head"] or [c for c in candidates if c.kind is None]
    if len(remaining) == 1:
        return remaining[0].path
    listed = "; ".join(map(str, (remaining or candidates)[:_LISTED]))
    if len(remaining or candidates) > _LISTED:
        listed += f"; and {len(remaining or candidates) - _LISTED} more"
    if not remaining:
        raise TapNotFound(
            f"attach_lara: the lists of attention blocks in {name} are called encoder, language model or copy of a model: "
            f"{listed}. If one of them is the diffusion transformer, say which: blocks='...'"
        )
    raise TapNotFound(
        f"attach_lara: {name} has several lists of attention blocks: {listed}. "
        "Say which is the diffusion transformer: blocks='...'"
    )


def doubt(policy: nn.Module, path: str) -> str | None:
    """What to say of blocks that :func:`find_blocks` took although nothing calls them an action head; else None."""
    taken = next((c for c in block_candidates(policy) if c.path == path), None)
    if taken is None or taken.kind == "head":
        return None
    return (
        f"LARA reads {taken}, taken because it is the only list of attention blocks in {type(policy).__name__} that can be "
        "the action head's; no name says that it is. lara.check(batch) proves it; blocks='...' names another"
    )


# ---------------------------------------------------------------------- structure


def _are_blocks(blocks: list[nn.Module]) -> bool:
    """Two or more modules of one class, each with an attention inside."""
    return len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and _has_attention(blocks[0])


def _has_attention(block: nn.Module) -> bool:
    return any(
        isinstance(part, nn.MultiheadAttention) or _ATTENTION.search(f"{name} {type(part).__name__}")
        for name, part in block.named_modules()
        if name
    )


def _is_network(block: nn.Module) -> bool:
    """Whether a block has a list of blocks of its own. Two attentions, or a part per modality, are not one."""
    return any(
        _are_blocks(inner)
        and not _is_attention(inner[0])
        and (len(inner) > 2 if path.endswith("*") else not isinstance(block.get_submodule(path), nn.ModuleDict))
        for path, inner in named_lists(block)
    )


def _is_attention(module: nn.Module) -> bool:
    parts = set(_parts(type(module).__name__))
    return isinstance(module, nn.MultiheadAttention) or (
        bool(parts & {"attention", "attn", "att"}) and not parts & {"block", "layer", "transformer"}
    )


# ---------------------------------------------------------------------- names


def _kind(policy: nn.Module, path: str, blocks: list[nn.Module]) -> Literal["head", "apart"] | None:
    names = [name for name in path.split(".") if name]
    above = [policy.get_submodule(".".join(names[:i])) for i in range(1, len(names))]
    classes = [_class_parts(module) for module in above]
    # a copy is one at any height; peft keeps the frozen original of a fully trained module under this name
    if (
        "original_module" in names
        or any(_has(_COPY, _parts(name)) for name in names)
        or any(_has(_COPY_CLASS, parts) for parts in classes)
    ):
        return "apart"
    # the name nearest to the blocks decides: vlm_with_expert.vlm.layers is apart, vlm_with_expert.lm_expert.layers is not
    levels = list(zip(reversed(names), [None, *reversed(above)]))
    for i, (name, module) in enumerate(levels):
        said = _said_of(name, module)
        if said == "apart" and name == "encoder" and isinstance(module, nn.TransformerEncoder):
            # a head that is an encoder through and through, as BERT is, cannot be told from the encoder of a head
            return None if any(_said_of(*level) == "head" for level in levels[i + 1 :]) else said
        if said:
            return said
    block = _parts(type(blocks[0]).__name__)
    own = _parts(type(policy).__name__) if len(names) < 2 else []
    if any(_said(parts, None) == "head" for parts in (block, own)):
        return "head"
    if any(_has(_TOWER, parts) for parts in (block, *classes)) or any("backbone" in _parts(name) for name in names):
        return "apart"
    return None


def _said_of(name: str, module: nn.Module | None) -> Literal["head", "apart"] | None:
    """What a name says, else the class of the module. A language model's class says nothing: experts are made of them."""
    return _said(_parts(name), _TOWER) or (None if module is None else _said(_class_parts(module), _VISION))


def _said(parts: list[str], tower: re.Pattern[str] | None) -> Literal["head", "apart"] | None:
    """What the parts of one identifier say: "lm_expert" is a head, "action_encoder" is none."""
    # what something is conditioned on is not what it is
    parts = [word for word, after in zip(parts, [*parts[1:], ""]) if after not in ("conditioned", "guided")]
    head = max((i for i, word in enumerate(parts) if _HEAD.fullmatch(word)), default=-1)
    role = max((i for i, word in enumerate(parts) if _ROLE.fullmatch(word)), default=-1)
    if role > head:
        return "apart"
    if head >= 0 or {"policy", "head"} <= set(parts):
        return "head"
    return "apart" if tower is not None and _has(tower, parts) else None


def _has(words: re.Pattern[str], parts: list[str]) -> bool:
    return any(words.fullmatch(word) for word in parts)


def _class_parts(module: nn.Module) -> list[str]:
    """Of a class, "TransformerEncoder" is a shape (nn.TransformerEncoder as a trunk), not the role of an encoder."""
    return _parts(type(module).__name__.replace("TransformerEncoder", "Transformer"))


def _parts(identifier: str) -> list[str]:
    for cased, plain in _CASED.items():
        identifier = identifier.replace(cased, plain)
    return [word.lower() for word in _WORD.findall(identifier)]
