"""The trained weights of a policy itself (`save_policy="trainable"`), as safetensors shards with an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterFormatError, LaraArgumentError
from ..storage.files import check_values, read_json, read_tensors, write_json, write_tensors
from ..storage.sharding import gathered, whole
from ..storage.untrusted import check_tensor_file, safe_path, short
from .layout import POLICY_FOLDER, POLICY_INDEX, Part

__all__ = ["check_choice", "gather_parts", "read_index", "restore", "trained_tensors"]

_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# wrappers in names; the tensors are saved under the names of the bare policy
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|base_layer)\.")
_PEFT_MODULES = re.compile(r"(?:^|\.)(?:modules_to_save|original_module|token_adapter)\.")


def check_choice(save_policy: str | None) -> None:
    """Raise LaraArgumentError for a `save_policy` that is neither None nor "trainable"."""
    if save_policy not in (None, "trainable"):
        raise LaraArgumentError(f"save_pretrained: save_policy={save_policy!r}, but None or 'trainable' is expected")


def _own(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The policy's state by the names of the bare policy, without LARA's and peft's parts."""
    lara = tuple(f"{path}." for path, m in policy.named_modules() if type(m).__name__ == "LaraAdapter")
    # of peft's layers
    tuners = {f".{name}." for m in policy.modules() for name in getattr(m, "adapter_layer_names", ())}
    own: dict[str, torch.Tensor] = {}
    # keep_vars: the parameters themselves, with their flags; FSDP2's are DTensors and ZeRO-3's are empty here
    for name, tensor in policy.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # extra state of a module
        peft = _PEFT_MODULES.search(name) or any(part in f".{name}." for part in tuners)
        if peft or name.startswith(lara):
            continue
        own[_WRAPPERS.sub("", name)] = tensor
    return own


def trained_tensors(policy: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that `save_policy="trainable"` stores.

    Parameters that require a gradient, and every persistent buffer: training may have changed it, and buffers are small.

    Returns:
        Name to tensor; and for tied weights, each further name to the stored one.

    Raises:
        LaraArgumentError: the policy is sharded by FSDP1, whose flat parameters have no names.
    """
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _own(policy).items():
        if "_flat_param" in name:
            raise LaraArgumentError("save_pretrained: save_policy='trainable' under FSDP1; use FSDP2 (fully_shard)")
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) in first:
            ties[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, ties


def gather_parts(policy: nn.Module, max_shard_size: int | str = "4GB") -> Iterator[Part]:
    """The files of what was trained of the policy; one shard at a time, so that only one is in memory twice.

    If the policy is sharded by FSDP2 or ZeRO-3, every rank must run this to its end.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    tensors, ties = trained_tensors(policy)
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: getattr(t, "ds_numel", t.numel()) * t.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, members in split.filename_to_tensors.items():
        with gathered(tensors[member] for member in members):
            shard = {member: whole(tensors[member]) for member in members}
            yield f"{POLICY_FOLDER}/{name}", partial(write_tensors, tensors=shard)
    content = {
        "metadata": {"total_size": int(split.metadata["total_size"]), "save_policy": "trainable"},
        "weight_map": dict(split.tensor_to_filename),
        "ties": ties,
    }
    yield POLICY_INDEX, partial(write_json, content=content)


def read_index(folder: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The shards of a saved policy, checked against their headers.

    Returns:
        Name of a shard's file to the names of its tensors; and further names of tied weights to stored ones.

    Raises:
        AdapterFormatError: the index or a shard is missing, the index names another file, or they do not agree.
    """
    path = safe_path(folder, POLICY_INDEX)
    content = read_json(path)
    weight_map: Any = content.get("weight_map")
    ties: Any = content.get("ties", {})
    for what, table in (("weight_map", weight_map), ("ties", ties)):
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise AdapterFormatError(f"{path}: {what} is {short(table)}, but text to text is expected")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not _SHARD.fullmatch(file):
            raise AdapterFormatError(
                f"{path}: {short(name)} is listed in {short(file)}, which is not the name of a shard"
            )
        shards.setdefault(file, []).append(name)
    for name, stored in ties.items():
        if stored not in weight_map or name in weight_map:
            raise AdapterFormatError(f"{path}: {short(name)} is tied to {short(stored)}, which is not stored")
    for file, names in shards.items():
        shard = safe_path(folder, f"{POLICY_FOLDER}/{file}")
        if not shard.is_file():
            raise AdapterFormatError(f"{shard} is missing, but {path.name} names it")
        if check_tensor_file(shard).keys() != set(names):
            raise AdapterFormatError(f"{shard} does not hold the tensors that {path.name} lists")
    return shards, ties


@torch.no_grad()
def restore(folder: Path, policy: nn.Module, *, dry: bool = False) -> int:
    """Load what :func:`gather_parts` gave into a policy, strictly, and count the tensors; nothing changes on an error.

    Args:
        folder: of the adapter.
        policy: the base, with or without LARA and LoRA.
        dry: only check.

    Raises:
        AdapterFormatError: the folder is damaged, or the policy lacks a tensor or has it in another shape.
    """
    shards, ties = read_index(folder)
    own = _own(policy)
    aliases: dict[str, list[str]] = {}
    for name, stored in ties.items():
        aliases.setdefault(stored, []).append(name)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in shards:
        shapes |= check_tensor_file(folder / POLICY_FOLDER / file)
    shapes |= {name: shapes[stored] for name, stored in ties.items()}
    missing = sorted(shapes.keys() - own.keys())
    if missing:
        raise AdapterFormatError(
            f"{folder / POLICY_FOLDER} was saved from another policy: this {type(policy).__name__} has no {missing[:5]} "
            f"({len(missing)} of {len(shapes)} tensors)"
        )
    for name, shape in shapes.items():
        if tuple(own[name].shape) != shape:
            raise AdapterFormatError(
                f"{folder / POLICY_FOLDER} was saved from another policy: {name} has shape {list(shape)}, but this "
                f"{type(policy).__name__} has {list(own[name].shape)}"
            )
    # all shards are checked before the first is loaded, and read twice so that they need not stay in memory
    for only_check in (True,) if dry else (True, False):
        for file in shards:
            path = folder / POLICY_FOLDER / file
            for name, tensor in read_tensors(path).items():
                for target in (name, *aliases.get(name, ())):
                    if only_check:  # buffers may be infinite (statistics before the first sample, masks)
                        buffer = not isinstance(own[target], nn.Parameter)
                        check_values(path, target, own[target], tensor, infinite=buffer)
                    else:
                        own[target].copy_(tensor)
    return len(shapes)
