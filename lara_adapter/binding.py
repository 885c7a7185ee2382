"""How LARA is bound to a policy: the entry into its forward, the hook that captures a hidden state, and their removal."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import AttachOrderError, TapNeverFired
from .hostcall import HostCall
from .policies import PolicySpec
from .tap import Tap, first_tensor

__all__ = ["ADAPTER_NAME", "Binding", "call_host", "refuse_export"]

ADAPTER_NAME = "lara"  # attribute of the owner under which the adapter is registered
_HOST_FORWARD = "_lara_host_forward"  # instance attribute: the forward that the instance itself had

# torch 2.7 to 2.11 (probed): is_exporting() is True in every torch.compile
_EXPORT_IS_KNOWN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class Binding:
    """The connection of an adapter to a policy. Not an nn.Module: the policy owns the adapter, not the other way round.

    Attributes:
        policy: the policy, without its PeftModel.
        peft: the PeftModel around the policy, or None.
        spec: the row of the policy table.
        tap: where the hidden state is read.
        attached: whether the policy has the entry and the hook.
        unbound: whether the policy was unpickled; a pickle cannot hold the entry into its forward.
        names: the positional parameters of the policy's forward, without self.
        accepts_any: whether the policy's forward takes any keyword.
    """

    def __init__(self, policy: nn.Module, peft: Any, spec: PolicySpec, tap: Tap) -> None:
        self.policy, self.peft, self.spec, self.tap = policy, peft, spec, tap
        parameters = list(inspect.signature(policy.forward).parameters.values())
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        self.accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.attached = self.unbound = False
        self._armed = False
        self._captured: torch.Tensor | None = None

    # ------------------------------------------------------------------ install and remove

    def install(self, adapter: nn.Module) -> None:
        """Register the adapter in the policy's tree, hook the tapped module and bind LARA's forward."""
        policy = self.policy
        tapped = policy.get_submodule(self.tap.path)
        policy.get_submodule(self.spec.owner).add_module(ADAPTER_NAME, adapter)
        if self.tap.kind == "output":
            tapped.register_forward_hook(self.capture_output)
        else:
            tapped.register_forward_pre_hook(self.capture_input, with_kwargs=True)
        if "forward" in policy.__dict__:
            policy.__dict__[_HOST_FORWARD] = policy.__dict__["forward"]
        self.bind_forward()
        self.attached = True

    def bind_forward(self) -> None:
        """Bind LARA's entry as the policy's `forward`."""
        signature = inspect.signature(self.policy.forward)
        unbound = signature.replace(
            parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
        )
        owner = tuple(filter(None, self.spec.owner.split(".")))
        object.__setattr__(self.policy, "forward", types.MethodType(_entry(owner, unbound), self.policy))
        self.unbound = False

    def remove(self) -> None:
        """Undo :meth:`install`.

        Raises:
            AttachOrderError: the adapter is not attached.
        """
        if not self.attached:
            raise AttachOrderError("lara.detach: this adapter is not attached to a policy")
        policy = self.policy
        for module in policy.modules():
            for hooks, companions in (
                (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
                (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            ):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    for table in (hooks, *companions):
                        table.pop(key, None)
        delattr(policy.get_submodule(self.spec.owner), ADAPTER_NAME)
        policy.__dict__.pop("forward", None)
        own = policy.__dict__.pop(_HOST_FORWARD, None)
        if own is not None:
            policy.__dict__["forward"] = own
        self.attached = False
        self._captured = None

    def detached_copy(self, adapter: nn.Module) -> nn.Module:
        """A deep copy of the policy as if LARA had never been attached; projector and LAM are not copied."""
        modules = dict(adapter._modules)
        adapter._modules.clear()
        try:
            double = copy.deepcopy(self.policy)
        finally:
            adapter._modules.update(modules)
        getattr(double.get_submodule(self.spec.owner), ADAPTER_NAME).binding.remove()
        return double

    # ------------------------------------------------------------------ the hidden state

    def capture_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the tapped block. It only stores: a hook that computes breaks gradient checkpointing and compile,
        one that returns a value replaces the output."""
        if self._armed and self._captured is None:
            self._captured = first_tensor(output)
        elif self.unbound:
            self._refuse_unbound()

    def capture_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the norm (or block) that reads the tapped state."""
        if self._armed and self._captured is None:
            state = first_tensor(args)
            self._captured = first_tensor(kwargs) if state is None else state
        elif self.unbound:
            self._refuse_unbound()

    def run(self, policy: nn.Module, own: Callable[..., Any] | None, call: HostCall) -> tuple[Any, torch.Tensor]:
        """Run the host's forward; returns its output and the hidden state [R, S, D] at the tap.

        Raises:
            TapNeverFired: no tensor passed the tap.
        """
        self._captured, self._armed = None, True
        try:
            output = call_host(policy, own, call)
        finally:
            self._armed = False
            hidden, self._captured = self._captured, None
        if hidden is None:
            raise TapNeverFired(
                f"no tensor passed {self.tap.path!r} ({self.tap.kind}) in this training forward of "
                f"{type(policy).__name__}, so nothing can be aligned. Either the host does not call its blocks (register a "
                "PolicySpec with tap='norm' and final_norm=), or they were compiled and run before attach_lara "
                "(attach first), or blocks= names the wrong list"
            )
        return output, hidden

    # ------------------------------------------------------------------ what is refused

    def verify(self, adapter: nn.Module, trainable: set[str]) -> None:
        """Check, at the first training forward, that what was attached is still what runs.

        Args:
            adapter: the adapter.
            trainable: names of its parameters that required a gradient when it was attached.

        Raises:
            AttachOrderError: nn.DataParallel replica, LARA frozen or given LoRA afterwards, or the tapped module replaced.
        """
        policy = self.policy
        if getattr(policy, "_is_replica", False):
            raise AttachOrderError(
                "this policy is a replica of nn.DataParallel, whose threads share one adapter; "
                "use one process per GPU instead: torchrun or accelerate launch"
            )
        parameters = dict(adapter.named_parameters())
        frozen = sorted(trainable - {name for name, p in parameters.items() if p.requires_grad})
        added = sorted(name for name in parameters if "lora_" in name)
        if added or frozen:
            change = f"LARA's {added[:3]} got LoRA" if added else f"LARA's {frozen[:3]} were frozen"
            raise AttachOrderError(
                f"{change} after attach_lara (get_peft_model does so). Order: "
                "policy = get_peft_model(policy, ...); lara = attach_lara(policy, ...); then the optimizer"
            )
        tapped = policy
        for name in filter(None, self.tap.path.split(".")):
            tapped = getattr(tapped, name, tapped)
            tapped = getattr(tapped, "_orig_mod", tapped)  # a block compiled after attaching
        hooks = (*tapped._forward_hooks.values(), *tapped._forward_pre_hooks.values())
        if not any(getattr(hook, "__self__", None) is self for hook in hooks):
            raise AttachOrderError(
                f"the module at {self.tap.path!r} was replaced after attach_lara, so its hook is lost; lara.detach(), then "
                "attach again"
            )

    def _refuse_unbound(self) -> None:
        """An unpickled policy must not train without LARA unnoticed.

        Raises:
            AttachOrderError: it is training.
        """
        if self.policy.training and torch.is_grad_enabled():
            raise AttachOrderError(
                "this policy was unpickled, and a pickle cannot hold LARA's entry into its forward; "
                "call policy.lara.rebind() before training, or policy.lara.detach()"
            )

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without a captured state."""
        return {**self.__dict__, "_captured": None, "_armed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An unpickled policy has its class's `forward` (a bound method is pickled by name): the hook then refuses to train
        until :meth:`bind_forward`."""
        self.__dict__.update(state)
        self.unbound = self.attached

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        double = type(self).__new__(type(self))
        memo[id(self)] = double
        double.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return double


def _entry(owner: tuple[str, ...], signature: inspect.Signature) -> Callable[..., Any]:
    """The function bound as the policy's `forward`.

    It has the original's signature, which transformers' Trainer reads (a **kwargs would stop the division by the
    accumulation steps), and no `__wrapped__`, along which accelerate would unwrap it and strip LARA. It finds the adapter
    through `self`, so that a deep copy of the policy uses the copy's adapter.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        for name in owner:
            module = getattr(module, name)
        return getattr(module, ADAPTER_NAME).run(self, self.__dict__.get(_HOST_FORWARD), args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = "The policy's own forward with the LARA terms folded into its loss; see lara_adapter."
    return forward


def call_host(policy: nn.Module, own: Callable[..., Any] | None, call: HostCall) -> Any:
    """Call the policy's own forward: `own` if the instance had one, else its class's."""
    if own is not None:
        return own(*call.args, **call.kwargs)
    return type(policy).forward(policy, *call.args, **call.kwargs)


def refuse_export() -> None:
    """Refuse to be exported: the graph would contain LARA's entry.

    Raises:
        AttachOrderError: torch.export, torch.onnx or torch.jit is tracing the policy.
    """
    if torch.compiler.is_dynamo_compiling() and not _EXPORT_IS_KNOWN:
        return  # a strict export passes too; in eval mode, as one exports, it contains nothing of LARA
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    if (exporting is not None and exporting()) or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        raise AttachOrderError(
            "this policy is being exported with LARA attached; lara.detach() first, or export lara.detached_copy()"
        )
