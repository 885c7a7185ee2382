"""How LARA is bound to a policy: the entry that training calls, the hook that captures a hidden state, their removal."""

from __future__ import annotations

import copy
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .blocks import block_paths
from .capture import input_state, join_runs, pick_state, unwrapped_state
from .entry import ADAPTER_NAME, HOST_ADAPTER, HOST_ENTRY, bound_entry, entry_used
from .errors import AttachOrderError, TapNeverFired
from .hostcall import HostCall
from .policies import PolicySpec
from .tap import Tap

__all__ = ["Binding", "refuse_export", "shared_turn"]

logger = logging.getLogger(__name__)

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
        unbound: whether the policy was unpickled; a pickle cannot hold the entry.
        names: the positional parameters of the entry, without self.
        accepts_any: whether the entry takes any keyword.
        shared: see :func:`shared_turn`.
        quiet: whether the blocks may run past the entry unnoticed, because LARA is idle by its settings.
        missed: whether the blocks ran in training past the entry since the last training step of LARA.
    """

    def __init__(self, policy: nn.Module, peft: Any, spec: PolicySpec, tap: Tap) -> None:
        self.policy, self.peft, self.spec, self.tap = policy, peft, spec, tap
        parameters = list(inspect.signature(getattr(*self.entry_of(policy))).parameters.values())
        self.names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        self.accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.attached = self.unbound = self.quiet = self.missed = False
        self.shared = shared_turn(policy, tap)
        self._armed = self._inside = self._warned = False
        self._captured: tuple[torch.Tensor, ...] = ()

    def entry_of(self, policy: nn.Module) -> tuple[nn.Module, str]:
        """The module that has the entry, and the name of the method."""
        path, _, method = self.spec.entry.rpartition(".")
        return policy.get_submodule(path), method

    def host_entry(self) -> tuple[nn.Module, Callable[..., Any] | None]:
        """The module that has the entry, and the instance's own entry if it had one before LARA."""
        module = self.entry_of(self.policy)[0]
        return module, module.__dict__.get(HOST_ENTRY)

    # ------------------------------------------------------------------ install and remove

    def install(self, adapter: nn.Module) -> None:
        """Register the adapter in the policy's tree, hook the tapped module and bind LARA's entry."""
        policy = self.policy
        tapped = policy.get_submodule(self.tap.path)
        policy.get_submodule(self.spec.owner).add_module(ADAPTER_NAME, adapter)
        if self.tap.kind == "output":
            tapped.register_forward_hook(self.capture_output)
        else:
            tapped.register_forward_pre_hook(self.capture_input, with_kwargs=True)
        module, method = self.entry_of(policy)
        if method in module.__dict__:
            module.__dict__[HOST_ENTRY] = module.__dict__[method]
        if module is not policy:
            module.__dict__[HOST_ADAPTER] = adapter
        self.bind_entry()
        self.attached = True

    def bind_entry(self) -> None:
        """Bind LARA's function in place of the policy's entry, again if something has put the policy's own back."""
        module, method = self.entry_of(self.policy)
        signature = inspect.signature(getattr(module, method))
        unbound = signature.replace(
            parameters=[inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
        )
        owner = tuple(filter(None, self.spec.owner.split("."))) if module is self.policy else None
        object.__setattr__(module, method, types.MethodType(bound_entry(owner, method, unbound), module))
        self.unbound = self.missed = self._warned = False

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
        module, method = self.entry_of(policy)
        module.__dict__.pop(method, None)
        module.__dict__.pop(HOST_ADAPTER, None)
        own = module.__dict__.pop(HOST_ENTRY, None)
        if own is not None:
            module.__dict__[method] = own
        self.attached = False
        self._captured = ()

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
        if self._armed:
            state = pick_state(output, self.spec.state, self.tap.path, self.tap.width)
            if state is not None:
                self._captured = (*self._captured, state)
        else:
            self._stray()

    def capture_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the norm (or block) that reads the tapped state."""
        if self._armed:
            state = input_state(args, kwargs, self.spec.state, self.tap.path)
            if state is not None:
                self._captured = (*self._captured, state)
        else:
            self._stray()

    def run(self, module: nn.Module, own: Callable[..., Any] | None, call: HostCall, pairs: int) -> tuple[Any, Any]:
        """Run the host's entry; returns its output and the hidden state [R, S, D] at the tap.

        Args:
            module: the module that has the entry.
            own: the instance's own entry; None: the class's.
            call: with the frames taken out.
            pairs: B, the number of pairs of frames.

        Raises:
            TapNeverFired: no tensor passed the tap.
            TokenError: the blocks ran several times, and it is not clear which run is meant.
        """
        output, runs = self.run_host(module, own, call)
        if not runs:
            raise TapNeverFired(
                f"no tensor passed {self.tap.path!r} ({self.tap.kind}) in this training forward of "
                f"{type(self.policy).__name__}, so nothing can be aligned. Either the host does not call its blocks "
                "(register a PolicySpec with tap='norm' and final_norm=), or they were compiled and run before attach_lara "
                "(attach first), or blocks= names the wrong list. If this batch does not reach the action head "
                "(co-training), leave its frames out: attach_lara(frames_optional=True)"
            )
        if len(runs) == 1:
            return output, runs[0]
        return output, join_runs(runs, pairs=pairs, shared=self.shared, spec=self.spec)[0]

    def run_host(
        self, module: nn.Module, own: Callable[..., Any] | None, call: HostCall
    ) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """Run the host's entry; returns its output and what passed the tap, in order."""
        runs: tuple[torch.Tensor, ...] = ()
        self._captured, self._armed, self.missed = runs, True, False
        try:
            output = self._call_host(module, own, call)
        finally:
            self._armed = False
            runs, self._captured = self._captured, ()
        return output, tuple(unwrapped_state(state, self.tap.path) for state in runs)

    def pass_through(self, module: nn.Module, own: Callable[..., Any] | None, call: HostCall) -> Any:
        """Run the host's entry as if LARA were not attached."""
        if torch.compiler.is_compiling():
            return self._call_host(module, own, call)
        before, self._inside = self._inside, True
        try:
            return self._call_host(module, own, call)
        finally:
            self._inside = before

    def _call_host(self, module: nn.Module, own: Callable[..., Any] | None, call: HostCall) -> Any:
        """Call the policy's own entry: `own` if the instance had one, else its class's."""
        if own is not None:
            return own(*call.args, **call.kwargs)
        method = self.spec.entry.rpartition(".")[2]
        return getattr(type(module), method)(module, *call.args, **call.kwargs)

    @property
    def running(self) -> bool:
        """Whether the host's entry is running for LARA; a host may call its own entry from inside."""
        return self._armed

    def _stray(self) -> None:
        """The tapped block ran outside LARA's entry: in training that is an error of the loop, said once.

        Raises:
            AttachOrderError: the policy was unpickled.
        """
        if torch.compiler.is_compiling() or self._inside or self.quiet:
            return
        if not self.policy.training or not torch.is_grad_enabled():
            return
        if self.unbound:
            raise AttachOrderError(
                "this policy was unpickled, and a pickle cannot hold LARA's entry into its forward; "
                "call policy.lara.rebind() before training, or policy.lara.detach()"
            )
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing recomputes blocks during backward
            return
        self.missed = True
        if self._warned:
            return
        self._warned = True
        used, entry = entry_used(self.policy, block_paths(self.policy, self.tap.blocks)), self.spec.entry
        if used == entry:
            why = f"the policy's own {entry} was put back after attach_lara (accelerate's remove_hook_from_module does so)"
            fix = "call lara.rebind()"
        elif used is None:
            why, fix = f"the blocks were called directly, past {entry}", "call the policy"
        else:
            why, fix = f"the loop calls {used}, not {entry}", f"attach there: attach_lara(..., entry={used!r})"
        logger.warning(
            "LARA is idle: the blocks of %s ran in training, but %s, so nothing is aligned. Fix: %s",
            type(self.policy).__name__, why, fix,
        )  # fmt: skip

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

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without a captured state."""
        return {**self.__dict__, "_captured": (), "_armed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An unpickled policy has its class's entry (a bound method is pickled by name): the hook then refuses to train
        until :meth:`bind_entry`."""
        self.__dict__.update(state)
        self.unbound = self.attached

    def __deepcopy__(self, memo: dict[int, Any]) -> Binding:
        double = type(self).__new__(type(self))
        memo[id(self)] = double
        double.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return double


def shared_turn(policy: nn.Module, tap: Tap) -> tuple[int, int]:
    """Which of the k places of the tapped block in the list of blocks is meant, and k: (0, 1) unless weights are tied."""
    if tap.layer == tap.depth and tap.kind == "input":
        return 0, 1  # the norm behind the blocks
    blocks = [policy.get_submodule(path) for path in block_paths(policy, tap.blocks)]
    index = max(tap.layer - 1, 0) if tap.kind == "output" else tap.layer
    places = [place for place, block in enumerate(blocks) if block is blocks[index]]
    return places.index(index), len(places)


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
