"""Build a policy whose parameters have shapes and no memory.

`torch.device("meta")` alone is not enough: constructors of real policies draw from distributions whose parameters they
check, call `self.to(device)`, and refuse to be built without a GPU or flash-attn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

__all__ = ["skeleton"]


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Within this context the parameters of new modules are on the meta device; buffers and all else are real.

    Weights are not initialised, and transformers does not check for flash-attn. Not thread-safe.
    """
    with contextlib.ExitStack() as stack:
        handle = register_module_parameter_registration_hook(_without_memory)
        stack.callback(handle.remove)
        stack.enter_context(_StayOnMeta())
        _patch_transformers(stack)
        yield


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


class _StayOnMeta(TorchFunctionMode):
    """`self.to(device)` in a constructor only changes the dtype: there is nothing to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES and args[0].is_meta:
            dtypes = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.dtype)]
            return args[0].to(dtypes[0]) if dtypes else args[0]
        return func(*args, **kwargs)


_MOVES = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)


def _patch_transformers(stack: contextlib.ExitStack) -> None:
    """Only if the host has imported it; what its version lacks is left out."""
    module: Any = sys.modules.get("transformers.modeling_utils")
    if module is None:
        return
    model = module.PreTrainedModel
    if "initialize_weights" not in vars(model):
        # 4.x: as its from_pretrained does, which is how such a policy is loaded; weights are not tied then either
        stack.enter_context(module.no_init_weights())

    def enable(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        config._attn_implementation = "flash_attention_2"
        return config

    for name, replacement in (
        ("initialize_weights", lambda *args, **kwargs: None),  # 5.x; it ties weights elsewhere
        ("_check_and_enable_flash_attn_2", classmethod(enable)),  # 4.51
        ("_flash_attn_2_can_dispatch", lambda *args, **kwargs: True),  # 4.53 to 4.57: read, not run
        ("_flash_attn_can_dispatch", lambda *args, **kwargs: True),  # 5.x
    ):
        if name in vars(model):
            stack.callback(setattr, model, name, vars(model)[name])
            setattr(model, name, replacement)
