"""The entry of a policy: the method that training calls with the batch, found, checked and replaced by LARA's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .errors import TapNotFound

__all__ = ["ADAPTER_NAME", "HOST_ADAPTER", "HOST_ENTRY", "bound_entry", "check_entry", "entry_used"]

ADAPTER_NAME = "lara"  # attribute of the owner under which the adapter is registered
HOST_ENTRY = "_lara_host_forward"  # instance attribute: the entry that the instance itself had
HOST_ADAPTER = "_lara_adapter"  # instance attribute of a submodule that has the entry; not in the module tree


def bound_entry(owner: tuple[str, ...] | None, method: str, signature: inspect.Signature) -> Callable[..., Any]:
    """The function bound in place of the policy's entry.

    It has the original's signature, which transformers' Trainer reads (a **kwargs would stop the division by the
    accumulation steps), and no `__wrapped__`, along which accelerate would unwrap it and strip LARA. It finds the adapter
    through `self`, so that a deep copy of the policy uses the copy's adapter.
    """

    def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        adapter: Any = self
        if owner is None:  # the entry of a submodule, which cannot look upwards
            adapter = self.__dict__[HOST_ADAPTER]
        else:
            for name in owner:
                adapter = getattr(adapter, name)
            adapter = getattr(adapter, ADAPTER_NAME)
        return adapter.run(self, self.__dict__.get(HOST_ENTRY), args, kwargs)

    entry.__name__ = entry.__qualname__ = method
    entry.__signature__ = signature  # type: ignore[attr-defined]
    entry.__doc__ = f"The policy's own {method} with the LARA terms folded into its loss; see lara_adapter."
    return entry


def check_entry(policy: nn.Module, entry: str) -> None:
    """Check that the policy has the method that training calls.

    Raises:
        TapNotFound: it has not, or its forward is not implemented, so that training must call another method.
    """
    path, _, method = entry.rpartition(".")
    try:
        function = getattr(policy.get_submodule(path), method, None)
    except AttributeError:
        function = None
    kind, others = type(policy).__name__, _losses_of(policy)
    has = f"; it has {others}" if others else ""
    if not callable(function) or isinstance(function, nn.Module):
        raise TapNotFound(f"attach_lara: entry={entry!r}, but {kind} has no such method{has}")
    if entry == "forward" and "forward" not in policy.__dict__ and not _implements_forward(type(policy)):
        raise TapNotFound(
            f"attach_lara: {kind}.forward is not implemented, so training calls another method{has}. Name it: "
            f"attach_lara(..., entry={others[0] if others else 'compute_loss'!r})"
        )


def _losses_of(policy: nn.Module) -> list[str]:
    """Names of the policy's own methods that sound like a training step, the likeliest first."""
    names = [name for cls in type(policy).__mro__ if cls.__module__.partition(".")[0] not in ("torch", "builtins")
             for name, value in vars(cls).items() if inspect.isfunction(value) and not name.startswith("_")]  # fmt: skip
    likely = ("compute_loss", "training_step", "loss", "get_loss", "forward_train", "train_step")
    return [name for name in likely if name in names]


def _implements_forward(cls: type) -> bool:
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is None:
            continue
        names = set(getattr(getattr(forward, "__code__", None), "co_names", ("?",)))
        if forward is vars(nn.Module)["forward"] or names == {"NotImplementedError"}:
            return False
        if names != {"super", "forward"}:  # LightningModule.forward only hands on
            return True
    return False


def entry_used(policy: nn.Module, blocks: Sequence[str]) -> str | None:
    """The outermost method of the policy, or of a part of it, that is running: dotted path; None: only blocks are.

    Args:
        policy: the policy.
        blocks: dotted paths of its blocks.
    """
    known = {id(module): path for path, module in policy.named_modules()}
    frame, found = sys._getframe(1), None
    while frame is not None:
        owner, name = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(owner, nn.Module) and id(owner) in known and name not in ("_call_impl", "_wrapped_call_impl"):
            found = (known[id(owner)], name)
        frame = frame.f_back  # type: ignore[assignment]
    if found is None or any(f"{found[0]}.".startswith(f"{block}.") for block in blocks):
        return None
    return ".".join(filter(None, found))
