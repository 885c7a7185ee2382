"""What is watched in every training forward, so that LARA never fails silently."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .errors import AttachOrderError, NonFiniteError, TapDetached
from .terms import LAM_REPORT

if TYPE_CHECKING:
    from .adapter import LaraAdapter

__all__ = ["check_gradient", "refuse_export", "refuse_unbound", "stop_if_not_finite", "verify_attachment"]


# torch 2.7 to 2.11 (probed) do not; 2.13 does
_TELLS_EXPORT_FROM_COMPILE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def verify_attachment(adapter: LaraAdapter) -> None:
    """Once, at the first training forward: what was attached is still what runs.

    Raises:
        AttachOrderError: nn.DataParallel replica, LARA frozen or given LoRA afterwards, or the tapped module replaced.
    """
    policy, tap = adapter.policy, adapter.config.tap
    if getattr(policy, "_is_replica", False):
        raise AttachOrderError(
            "this policy is a replica of nn.DataParallel, whose threads share one adapter; "
            "start one process per GPU instead: torchrun or accelerate launch"
        )
    parameters = dict(adapter.named_parameters())
    frozen = sorted(adapter._trainable - {name for name, p in parameters.items() if p.requires_grad})
    added = sorted(name for name in parameters if "lora_" in name)
    if added or frozen:
        what = f"put LoRA into {added[:3]}" if added else f"froze {frozen[:3]}"
        raise AttachOrderError(
            f"something {what} of LARA after attach_lara (get_peft_model does so to whatever is attached). "
            "Order: policy = get_peft_model(policy, ...); lara = attach_lara(policy, ...); then the optimizer"
        )
    tapped = policy
    for name in filter(None, tap.split(".")):
        tapped = getattr(tapped, name, tapped)
        tapped = getattr(tapped, "_orig_mod", tapped)  # a block compiled after attaching
    hooks = (*tapped._forward_hooks.values(), *tapped._forward_pre_hooks.values())
    if not any(getattr(hook, "__self__", None) is adapter for hook in hooks):
        raise AttachOrderError(
            f"the module at {tap!r} was replaced after attach_lara, so its hook is lost; lara.detach() and attach again"
        )


def refuse_export(adapter: LaraAdapter) -> None:
    """An exported graph must not hold LARA's entry.

    Raises:
        AttachOrderError: torch.export, torch.onnx or torch.jit is tracing the policy.
    """
    if torch.compiler.is_dynamo_compiling() and not _TELLS_EXPORT_FROM_COMPILE:
        # is_exporting() is then True in every torch.compile. A strict export is let through; in eval mode, as one
        # exports, it holds nothing of LARA either.
        return
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    if (exporting is not None and exporting()) or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        raise AttachOrderError(
            "this policy is being exported with LARA attached; lara.detach() first, or export lara.detached_copy()"
        )


def refuse_unbound(adapter: LaraAdapter) -> None:
    """A policy out of a pickle must not train without LARA unnoticed.

    Raises:
        AttachOrderError: it is training.
    """
    if adapter.training and torch.is_grad_enabled():
        raise AttachOrderError(
            "this policy came out of a pickle, which cannot hold LARA's entry into its forward; "
            "call policy.lara.rebind() before training, or policy.lara.detach()"
        )


def check_gradient(adapter: LaraAdapter, hidden: torch.Tensor) -> None:
    """The alignment must reach the policy, unless nothing of the policy trains.

    Raises:
        TapDetached: the hidden state carries no graph.
    """
    if hidden.requires_grad:
        return
    own = {id(p) for p in adapter.parameters()}
    if any(p.requires_grad and id(p) not in own for p in adapter.policy.parameters()):
        raise TapDetached(
            f"the hidden state at {adapter.config.tap!r} does not require grad, so LARA cannot reach the policy. Either "
            "no trainable parameter lies below that layer (unfreeze some, or tap a later layer), or reentrant "
            "gradient checkpointing cut the graph: use_reentrant=False"
        )


def stop_if_not_finite(adapter: LaraAdapter, hidden: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
    """One synchronisation with the device; the search for the culprit only if something is wrong.

    Raises:
        NonFiniteError: a LARA term is NaN or infinite; the message names where it began.
    """
    align, lam = terms["align"].detach(), terms["lam"].detach()
    if bool(torch.isfinite(torch.stack([align, lam])).all()):
        return
    suspects = [
        ("the policy's hidden state", hidden),
        *((f"the LAM's {name}", terms[name]) for name in LAM_REPORT if name in terms),
        ("the LAM's latent action (latent_std)", terms["latent_std"]),
        ("the LAM's loss", lam),
        ("the alignment loss", align),
    ]
    culprit = next(name for name, value in suspects if not torch.isfinite(value.detach()).all())
    raise NonFiniteError(
        f"LARA: {culprit} is not finite at step {adapter.step - 1}; stopped before it reaches a weight "
        f"(align {float(align):.4g}, LAM {float(lam):.4g})"
    )
