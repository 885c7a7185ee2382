"""Lists of blocks in a policy, and their names.

A name is a string that can be saved and found again: the dotted path of a container ("model.blocks"), a path with one * for
numbered attributes ("net.block*"), or several paths with commas ("net.first,net.second,net.rest"). The blocks of such a
list may be one and the same module several times (weight-tied depth), so nothing here goes by `children()`, which
gives each module once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .errors import LaraArgumentError, TapNotFound

__all__ = ["CONTAINERS", "Blocks", "block_paths", "blocks_name", "named_lists", "same_blocks", "submodule"]

Blocks = str | nn.Module | Sequence[nn.Module]
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)
# what stands between a module and its children once it is compiled, checkpointed or sharded
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def block_paths(policy: nn.Module, blocks: str) -> tuple[str, ...]:
    """Dotted paths of the blocks in the list of this name, in order.

    Args:
        policy: the policy, unwrapped.
        blocks: the name: a container, numbered attributes with *, or several paths with commas, each a block, a
            ModuleList or ModuleDict of blocks, or numbered attributes.

    Raises:
        TapNotFound: a path does not exist, or is not a list of blocks.
    """
    items = [item.strip() for item in blocks.split(",")]
    if len(items) > 1 and "" in items:
        raise TapNotFound(f"attach_lara: blocks={blocks!r} has an empty path between its commas")
    paths: list[str] = []
    for item in items:
        paths += _numbered_paths(policy, item) if "*" in item else _paths_at(policy, item, alone=len(items) == 1)
    return tuple(paths)


def blocks_name(policy: nn.Module, blocks: Blocks) -> str:
    """The name of a list of blocks.

    Args:
        policy: the policy, unwrapped.
        blocks: a name; a container of the policy; or a container, list or tuple of modules of the policy.

    Raises:
        TapNotFound: a module is not part of the policy, or there is none.
        LaraArgumentError: neither a string nor modules.
    """
    if isinstance(blocks, str):
        return ",".join(item.strip() for item in blocks.split(","))
    if isinstance(blocks, nn.Module):
        path = _path_of(policy, blocks)
        if path is not None:
            return path
    if isinstance(blocks, CONTAINERS):
        members = _members(blocks)
    elif isinstance(blocks, nn.Module):
        members = [blocks]
    elif isinstance(blocks, (list, tuple)) and all(isinstance(block, nn.Module) for block in blocks):
        members = list(blocks)
    else:
        raise LaraArgumentError(
            f"attach_lara: blocks is a {type(blocks).__name__}, but a dotted path (several with commas), a ModuleList or a "
            "list of modules of the policy is expected"
        )
    if not members:
        raise TapNotFound(f"attach_lara: blocks= is an empty {type(blocks).__name__}; pass the policy's blocks")
    for path, found in named_lists(policy):
        if _same(found, members):
            return path
    paths = [_path_of(policy, block) for block in members]
    for block, path in zip(members, paths):
        if path is None:
            raise TapNotFound(
                f"attach_lara: blocks= holds a {type(block).__name__} that is not part of the policy; pass modules that "
                "are, or their path"
            )
    return ",".join(map(str, paths))


def same_blocks(policy: nn.Module, one: str, other: str) -> bool:
    """Whether two names stand for the same blocks; False if one of them does not exist in this policy."""
    if one == other:
        return True
    try:
        lists = [[policy.get_submodule(path) for path in block_paths(policy, name)] for name in (one, other)]
    except TapNotFound:
        return False
    return _same(*lists)


def named_lists(policy: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Name and modules of each container, and of each two or more numbered attributes, from the outside in."""
    for path, module in policy.named_modules():
        if isinstance(module, CONTAINERS):
            yield path, _members(module)
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            prefixes = {match[1]: None for name in module._modules if (match := _NUMBERED.fullmatch(name))}
            for prefix in prefixes:
                names = _numbered_children(module, prefix, "")
                if len(names) > 1:
                    yield _join(path, f"{prefix}*"), [module._modules[name] for name in names]


def submodule(policy: nn.Module, path: str, argument: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        TapNotFound: there is none; the message says how far the path leads, and what is there.
    """
    try:
        return policy.get_submodule(path)
    except AttributeError:
        known, rest = policy, path.split(".")
        done: list[str] = []
        while rest and isinstance(getattr(known, rest[0], None), nn.Module):
            known = getattr(known, rest[0])
            done.append(rest.pop(0))
        raise TapNotFound(
            f"attach_lara: {argument}={path!r}, but {'.'.join(done) or type(policy).__name__} has no {rest[0]!r}; "
            f"it has {_children(known)}"
        ) from None


def _paths_at(policy: nn.Module, path: str, *, alone: bool) -> list[str]:
    """Paths of the blocks in the container at `path`; among several paths, one may be a block itself."""
    module = submodule(policy, path, "blocks")
    # a Sequential among several paths is one block: the others cannot be called
    if not isinstance(module, CONTAINERS if alone else (nn.ModuleList, nn.ModuleDict)):
        if not alone:
            return [path]
        lists = [_join(path, name) for name, _ in named_lists(module) if name]
        raise TapNotFound(
            f"attach_lara: blocks={path!r} is a {type(module).__name__}, but a ModuleList of blocks is expected"
            + (f"; inside it: {lists[:5]}" if lists else "")
        )
    paths = [_join(path, name) for name, block in module._modules.items() if block is not None]
    if not paths:
        raise TapNotFound(f"attach_lara: blocks={path!r} is an empty {type(module).__name__}; name one that has blocks")
    return paths


def _numbered_paths(policy: nn.Module, pattern: str) -> list[str]:
    names = pattern.split(".")
    starred = [i for i, name in enumerate(names) if "*" in name]
    if pattern.count("*") != 1:
        raise TapNotFound(f"attach_lara: blocks={pattern!r} has {pattern.count('*')} times *, but one is expected")
    above, below = ".".join(names[: starred[0]]), ".".join(names[starred[0] + 1 :])
    parent = submodule(policy, above, "blocks") if above else policy
    for wrapped in _WRAPPED:
        parent = parent._modules.get(wrapped) or parent
    prefix, _, suffix = names[starred[0]].partition("*")
    found = _numbered_children(parent, prefix, suffix)
    if len(found) < 2:
        raise TapNotFound(
            f"attach_lara: blocks={pattern!r}, but {above or type(policy).__name__} has {len(found)} children of that name "
            f"with a number for *, and two or more are expected; it has {_children(parent)}"
        )
    paths = [_join(above, name, below) for name in found]
    for path in paths:
        submodule(policy, path, "blocks")
    return paths


def _numbered_children(module: nn.Module, prefix: str, suffix: str) -> list[str]:
    """Names of the children prefix + number + suffix, by number."""
    name_of = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(suffix))
    found = [(int(match[1]), name) for name, child in module._modules.items()
             if child is not None and (match := name_of.fullmatch(name))]  # fmt: skip
    return [name for _, name in sorted(found)]


def _members(container: nn.Module) -> list[nn.Module]:
    return [block for block in container._modules.values() if block is not None]


def _path_of(policy: nn.Module, wanted: nn.Module) -> str | None:
    return next((path for path, module in policy.named_modules() if module is wanted), None)


def _children(module: nn.Module) -> list[str]:
    return sorted(name for name, _ in module.named_children())[:20]


def _join(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other))
