"""The policy's LoRA in peft's own format: writing it, and reading an untrusted one.

peft acts on its configuration: it imports modules by name, matches regular expressions, allocates by rank. So a downloaded
configuration is read here, and peft gets the few settings that are numbers and flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterFormatError, HostNotInstalled
from ..storage.files import check_tensors, read_json, read_tensors, write_json, write_tensors
from ..storage.sharding import gathered, whole
from ..storage.untrusted import check_tensor_file, safe_path, short
from .layout import LORA_CONFIG, LORA_FOLDER, LORA_WEIGHTS, Part

__all__ = ["applied", "gather_parts", "restore", "settings"]

logger = logging.getLogger(__name__)

_LORA_A = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
# passed to peft after a check of their type
_KEPT: dict[str, tuple[type, ...]] = {
    "r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "fan_in_fan_out": (bool,), "bias": (str,),
    "use_rslora": (bool,), "use_dora": (bool,), "lora_bias": (bool,), "modules_to_save": (list, type(None)),
    "rank_pattern": (dict, type(None)), "alpha_pattern": (dict, type(None)), "target_parameters": (list, type(None)),
}  # fmt: skip
# without effect once the weights are loaded
_DROPPED = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
            "init_lora_weights", "runtime_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
            "lora_ga_config", "ensure_weight_tying"}  # fmt: skip
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mipe")  # the base weights do not change
_BASE_CHANGING_INIT = ("olora", "pissa")  # peft changes the base weights in the same way again
_NAME = re.compile(r"[\w.-]{1,512}")
_PATTERN = re.compile(r"\^?[\w\\.-]{1,512}\$?")  # no quantifiers, which could take exponential time


def gather_parts(wrapped: Any) -> Iterator[Part]:
    """The files of a PeftModel's active LoRA; nothing if it has none. They name no base, which may be a local path.

    If its tensors are sharded, every rank must run this to its end.
    """
    names = list(wrapped.active_adapters)
    config = wrapped.peft_config[names[0]]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or len(names) > 1 or len(wrapped.peft_config) > 1:
        logger.warning(
            "of the policy's peft adapters %s (%s) %s; write the others with the policy's own save_pretrained",
            sorted(wrapped.peft_config), kind, f"only {names[0]!r} is saved" if kind == "LORA" else "nothing is saved",
        )  # fmt: skip
    if kind != "LORA":
        return
    with gathered(wrapped):
        tensors = {name: whole(tensor) for name, tensor in _tensors(wrapped, names[0]).items()}
        yield LORA_WEIGHTS, partial(write_tensors, tensors=tensors)
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    content |= {"inference_mode": True, "base_model_name_or_path": None, "revision": None, "auto_mapping": None}
    yield LORA_CONFIG, partial(write_json, content=content)


def _lara_prefixes(wrapped: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}." for path, module in wrapped.named_modules() if type(module).__name__ == "LaraAdapter")


def _tensors(wrapped: Any, adapter: str) -> dict[str, torch.Tensor]:
    """What peft saves of an adapter, without LARA's: with bias="all" peft takes every bias below the PeftModel."""
    from peft import get_peft_model_state_dict

    lara = _lara_prefixes(wrapped)
    tensors = get_peft_model_state_dict(wrapped, adapter_name=adapter)
    if wrapped.peft_config[adapter].bias == "lora_only":
        tensors |= _biases_of_layers(wrapped)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(lara)}


def _biases_of_layers(wrapped: Any) -> dict[str, torch.Tensor]:
    """The biases that bias="lora_only" trains; peft 0.17 looks for them beside the base layer and finds none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = wrapped.named_modules()
    names = {f"{path}.base_layer.bias" for path, layer in modules if isinstance(layer, BaseTunerLayer)}
    return {name: tensor for name, tensor in wrapped.state_dict().items() if name in names}


def settings(folder: Path) -> dict[str, Any]:
    """The arguments of peft's LoraConfig for the LoRA in an adapter's folder.

    Raises:
        AdapterFormatError: it is not LoRA, names code, or uses an unsupported setting.
    """
    path = safe_path(folder, LORA_CONFIG)
    content = read_json(path)
    pickles = sorted(p.name for p in (folder / LORA_FOLDER).iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise AdapterFormatError(
            f"{folder / LORA_FOLDER} holds {pickles}: pickles can run code, only safetensors is read"
        )
    shapes = check_tensor_file(_weights(folder))
    if content.get("peft_type") != "LORA":
        raise AdapterFormatError(f"{path}: peft_type is {short(content.get('peft_type'))}, but 'LORA' is expected")
    base = content.get("base_model_name_or_path")
    if content.get("auto_mapping") or content.get("megatron_core") not in (None, "megatron.core"):
        raise AdapterFormatError(f"{path} names code to import (auto_mapping or megatron_core), which is never done")
    if base is not None and not isinstance(base, str):
        raise AdapterFormatError(f"{path}: base_model_name_or_path is {short(base)}, but a text is expected")
    arguments = {name: content[name] for name in _KEPT if name in content}
    for name, value in arguments.items():
        if not isinstance(value, _KEPT[name]) or (isinstance(value, bool) and bool not in _KEPT[name]):
            raise AdapterFormatError(f"{path}: {name} is {short(value)}")
    _check_values(path, arguments, max((n for shape in shapes.values() for n in shape), default=0))
    init = content.get("init_lora_weights", True)
    if not any(init is plain or init == plain for plain in _PLAIN_INIT):
        if init not in _BASE_CHANGING_INIT:
            raise AdapterFormatError(
                f"{path}: init_lora_weights={short(init)} cannot be restored exactly; convert it to plain LoRA in peft"
            )
        arguments["init_lora_weights"] = init
    others = {name: content[name] for name in content.keys() - _KEPT.keys() - _DROPPED if content[name]}
    unsupported = sorted(name for name, value in others.items() if not _is_default(name, value))
    if unsupported:
        raise AdapterFormatError(f"{path} asks for {unsupported}, which lara_adapter does not restore")
    # full names of modules, from the weights: the configuration may have a pattern
    targets = sorted({match[1] for name in shapes if (match := _LORA_A.fullmatch(name))})
    if arguments.get("target_parameters"):
        modules = content.get("target_modules")
        targets = modules if isinstance(modules, list) else []
    plain = all(isinstance(target, str) and _NAME.fullmatch(target) for target in targets)
    if not plain or not (targets or arguments.get("target_parameters")):
        raise AdapterFormatError(f"{_weights(folder)} holds no LoRA of named modules: {short(sorted(shapes)[:5])}")
    return {**arguments, "target_modules": targets}


def _weights(folder: Path) -> Path:
    path = safe_path(folder, LORA_WEIGHTS)
    if not path.is_file():
        names = sorted(p.name for p in (folder / LORA_FOLDER).iterdir())
        raise AdapterFormatError(f"{path} is missing: the folder holds {names[:20]}; only safetensors is read")
    return path


def _check_values(path: Path, arguments: dict[str, Any], largest: int) -> None:
    """Ranks must be sizes of the weights, since peft allocates by them; names and patterns must be plain."""
    ranks = [arguments.get("r", 8), *(arguments.get("rank_pattern") or {}).values()]
    for rank in ranks:
        if type(rank) is not int or not 1 <= rank <= max(largest, 1):
            raise AdapterFormatError(f"{path}: a rank of {short(rank)}, but no tensor has that size")
    for alpha in (arguments.get("lora_alpha", 8), *(arguments.get("alpha_pattern") or {}).values()):
        if type(alpha) not in (int, float):
            raise AdapterFormatError(f"{path}: lora_alpha {short(alpha)}")
    for name in [*(arguments.get("rank_pattern") or {}), *(arguments.get("alpha_pattern") or {})]:
        if not _PATTERN.fullmatch(name):
            raise AdapterFormatError(f"{path}: {short(name)} is not a plain module name; save ranks by full names")
    for name in [*(arguments.get("modules_to_save") or []), *(arguments.get("target_parameters") or [])]:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise AdapterFormatError(f"{path}: {short(name)} is not a module name")
    if arguments.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterFormatError(f"{path}: bias is {short(arguments['bias'])}")


def _is_default(name: str, value: Any) -> bool:
    """Whether a setting that is not passed on has the default of the installed peft."""
    from peft import LoraConfig

    field = next((item for item in dataclasses.fields(LoraConfig) if item.name == name), None)
    return field is not None and value == field.default


def restore(wrapped: Any, folder: Path) -> None:
    """Load saved LoRA weights into the active adapter of a PeftModel, strictly.

    Raises:
        AdapterFormatError: damaged, or its names or shapes are not those of this LoRA; the model is then unchanged.
    """
    from peft import set_peft_model_state_dict

    path = _weights(folder)
    tensors = read_tensors(path)
    name = next(iter(wrapped.active_adapters))
    own = _tensors(wrapped, name)
    fix = "wrap the policy with the settings it was saved with, or let load_lara(..., inference=True) do it"
    check_tensors(path, tensors, own, "the policy's LoRA", f"; {fix}")
    # with LARA's own tensors, or it would say that this checkpoint lacks them
    lara = _lara_prefixes(wrapped)
    tensors |= {key: tensor for key, tensor in wrapped.state_dict().items() if key.startswith(lara)}
    set_peft_model_state_dict(wrapped, tensors, adapter_name=name)


@contextlib.contextmanager
def applied(policy: nn.Module, folder: Path, *, merge: bool) -> Iterator[None]:
    """A context that loads saved LoRA into a base policy, to act; on exit it is merged.

    Args:
        policy: the base policy, or a PeftModel of it whose LoRA receives the weights.
        folder: of LARA's adapter.
        merge: on exit, merge the LoRA into the weights, so that nothing of peft remains.

    Raises:
        AdapterFormatError: see :func:`settings` and :func:`restore`; the policy is then as before.
        HostNotInstalled: peft is missing.
    """
    try:
        from peft import LoraConfig, PeftModel
    except ImportError as error:
        raise HostNotInstalled(
            f"{folder} holds LoRA of the policy, which needs peft (pip install 'lara-adapter[train]'): {error}"
        ) from error
    arguments = settings(folder)
    if isinstance(policy, PeftModel):
        restore(policy, folder)
        yield
        if merge:
            policy.merge_and_unload(safe_merge=True)
        return
    modules = dict(policy.named_modules())
    absent = [name for name in arguments["target_modules"] if name not in modules]
    if absent and not arguments.get("target_parameters"):
        raise AdapterFormatError(
            f"{folder / LORA_FOLDER} was saved from another policy: this {type(policy).__name__} has no {absent[:3]} "
            f"({len(absent)} of {len(arguments['target_modules'])} modules)"
        )
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    before = policy.__dict__.get("peft_config")
    wrapped = None
    try:
        with torch.random.fork_rng(devices=[]):  # the initialisation, which is overwritten, draws random numbers
            wrapped = PeftModel(policy, _config(LoraConfig, arguments))
        restore(wrapped, folder)
        yield
        if merge:
            wrapped.merge_and_unload(safe_merge=True)
            _restore_flags(policy, flags, before)
    except BaseException as error:
        if wrapped is not None:
            wrapped.unload()
        _restore_flags(policy, flags, before)
        of_peft = isinstance(error, (ValueError, KeyError, TypeError, RuntimeError, AttributeError))
        if isinstance(error, AdapterFormatError) or not of_peft:
            raise
        raise AdapterFormatError(f"{folder / LORA_FOLDER} does not fit this policy: {error}") from error


def _config(kind: Any, arguments: dict[str, Any]) -> Any:
    """A LoraConfig, without settings that are off and that an older peft does not know."""
    known = {item.name for item in dataclasses.fields(kind)}
    return kind(inference_mode=True, **{name: value for name, value in arguments.items() if value or name in known})


def _restore_flags(policy: nn.Module, flags: dict[str, bool], before: Any) -> None:
    """Undo what peft did to a policy besides its layers."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))
    if before is None:
        policy.__dict__.pop("peft_config", None)
    else:
        policy.peft_config = before
