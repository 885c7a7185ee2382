"""The arithmetic of one step: latent actions, projection, alignment, statistics. Tensors in, tensors out."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import LaraArgumentError, NonFiniteError, TapDetached
from .losses import Alignment, Contrastive, CosineDistance, most_of_ranks

__all__ = ["LAM_REPORT", "LaraLosses", "align_rows", "build_projector", "check_gradient", "frozen_latent",
           "latent_statistics", "own_draws", "project", "read_values", "stop_if_not_finite", "trained_in_float32",
           "trained_latent"]  # fmt: skip

logger = logging.getLogger(__name__)

LAM_REPORT = ("reconstruction_loss", "copy_loss", "codebook_loss", "commitment_loss", "perceptual_loss", "perplexity",
              "codes_used")  # fmt: skip
_HALF = (torch.bfloat16, torch.float16)
_MEMORY = 0.95  # of the running mean direction: about the last twenty batches

Latent = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class LaraLosses(NamedTuple):
    """The LARA terms of one training forward; scalars, float32, with their graph.

    Attributes:
        align: alignment loss (LARA, Eq. 6), unweighted.
        lam: the latent action model's loss (LARA, Eq. 3), unweighted; 0 with a frozen LAM.
        total: w1 * align + w2 * lam.
    """

    align: torch.Tensor
    lam: torch.Tensor
    total: torch.Tensor


@contextlib.contextmanager
def own_draws(seed: torch.Tensor) -> Iterator[None]:
    """A context whose random draws depend on `seed` [] int64 alone and do not shift the policy's noise."""
    device = seed.device
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        # torch.manual_seed on a CPU records a stack trace for each kind of device that is not available
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(seed))
        yield


def frozen_latent(lam: Any, present: torch.Tensor, future: torch.Tensor, **known: torch.Tensor) -> Latent:
    """The latent action of a frozen LAM (LARA, Eq. 5): no graph, no loss, no report.

    Args:
        lam: `encode(present, future)` gives `.continuous`.
        present: [B, 3, H, W] frames.
        future: [B, 3, H, W] frames.
        **known: `features`, where the batch brought the cached ones.
    """
    with torch.no_grad():
        latent = lam.encode(present, future, **known).continuous.detach()
    return latent, torch.zeros((), dtype=torch.float32, device=latent.device), {}


def trained_latent(
    lam: Any, present: torch.Tensor, future: torch.Tensor, real: torch.Tensor, takes_valid: bool, **part: Any
) -> Latent:
    """The latent action of a LAM that trains.

    Args:
        lam: `forward(present, future[, valid=])` gives `.loss` and `.latent.continuous`.
        present: [B, 3, H, W] frames.
        future: [B, 3, H, W] frames.
        real: [B] bool; other pairs do not count.
        takes_valid: whether `lam.forward` takes the flags as `valid`.
        **part: `reconstruct` and `draw`, where only a part of the pairs is reconstructed; `features`, where the batch
            brought the cached ones.

    Returns:
        The latent [B, N, D] with its graph; L_LAM (LARA, Eq. 3), float32, 0 if no pair is real, with every parameter
        still in its graph (DDP); and the detached scalars the LAM reports.
    """
    if takes_valid:
        output = lam(present, future, valid=real, **part)
    else:  # a LAM without flags gets copies of a real pair in place of the others
        first = real.to(torch.uint8).argmax()
        index = torch.where(real, torch.arange(len(real), device=real.device), first)
        output = lam(present[index], future[index], **part)
    loss = output.loss.float() * real.any()
    report = {
        name: value.detach()
        for name in LAM_REPORT
        if isinstance(value := getattr(output, name, None), torch.Tensor) and value.numel() == 1
    }
    if "reconstruction_loss" in report and "copy_loss" in report:
        report["reconstruction_over_copy"] = report["reconstruction_loss"] / report["copy_loss"].clamp_min(1e-12)
    return output.latent.continuous, loss, report


def project(projector: nn.Module, vectors: torch.Tensor, latent_width: int) -> torch.Tensor:
    """Apply the projector in its own dtype; the result is float32.

    Raises:
        LaraArgumentError: its output has another width than the latent action.
    """
    dtype = torch.float32
    for parameter in projector.parameters():  # a loop and not next(): torch 2.7 cannot compile next() with a default
        dtype = parameter.dtype
        break
    projected: torch.Tensor = projector(vectors.to(dtype))
    if projected.shape[-1] != latent_width:
        raise LaraArgumentError(
            f"the projector gives width {projected.shape[-1]}, but the latent action has {latent_width}"
        )
    return projected.float()


def align_rows(
    alignment: Alignment, projected: torch.Tensor, latent: torch.Tensor, valid: torch.Tensor, uneven: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Alignment loss of each row [r, B], the mean over the views; and how many pairs are each other's negatives.

    The number is a scalar, of all ranks and of the draw that has most: a sample's other draws and views are not among its
    negatives. None with an alignment that has none.

    Args:
        alignment: callable(projected [B, W], latent [B, W], valid [B]) -> [B].
        projected: [r, B, W] float32, of r noise draws.
        latent: [B, V, W] float32, of V views.
        valid: [r, B] bool.
        uneven: whether ranks may differ in r and V.
    """
    draws, views = len(projected), latent.shape[1]
    if isinstance(alignment, CosineDistance):
        return alignment(projected[:, :, None], latent).mean(2), None
    each_view = latent.transpose(0, 1)  # [V, B, W]
    if not isinstance(alignment, Contrastive):
        calls = itertools.product(zip(projected, valid), each_view)
        losses = torch.stack([alignment(mine, theirs, flags) for (mine, flags), theirs in calls])
        return losses.unflatten(0, (draws, views)).mean(1), None
    shape = draws, views, *projected.shape[1:]
    mine, theirs = (x.expand(shape).flatten(0, 1) for x in (projected[:, None], each_view))
    flags = valid[:, None].expand(shape[:3]).flatten(0, 1)
    # one exchange of the same size on all ranks: what a rank has less than others counts for nothing
    missing = most_of_ranks(len(mine), projected.device) - len(mine) if uneven else 0
    if missing:
        mine, theirs = (torch.cat([x, x[:1].expand(missing, -1, -1)]) for x in (mine, theirs))
        flags = torch.cat([flags, torch.zeros_like(flags[:1]).expand(missing, -1)])
    losses, counts = alignment.compare(mine, theirs, flags)
    rows = losses[: draws * views].unflatten(0, (draws, views)).mean(1)
    return (rows + 0 * losses[draws * views :].sum() if missing else rows), counts.max()


def latent_statistics(
    latent: torch.Tensor, real: torch.Tensor, direction: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics that show a collapsing LAM; call under no_grad.

    Args:
        latent: [B, V, W] float32.
        real: [B] bool.
        direction: [W] float32, running mean of z/|z|; updated in place.
        step: 0-dim, training forwards before this one.

    Returns:
        Std over the batch, the mean over dimensions; and |E[z/|z|]|^2 over recent batches, 1 for a constant direction.
    """
    share = real.to(latent.dtype) / real.sum().clamp_min(1)  # as a product with it, the mean over the pairs that count
    flat = latent.detach().mean(1)
    spread = (share @ (flat - share @ flat).square()).sqrt().mean()
    # a batch without a pair moves nothing
    direction.lerp_(share @ nn.functional.normalize(flat, dim=-1), (1 - _MEMORY) * share.sum())
    return spread, (direction / (1 - _MEMORY ** (step + 1).float())).square().sum()


def build_projector(
    kind: str | nn.Module, hidden_width: int | None, latent_width: int, device: str = "cpu"
) -> nn.Module:
    """The projection head f_psi: "linear" (official release), "mlp" (paper), or the user's own module.

    Ours is float32 and on `device` whatever torch's default dtype and device: in 16 bits most steps would change nothing.

    Raises:
        LaraArgumentError: unknown kind, or the width of the hidden state is unknown.
    """
    if isinstance(kind, nn.Module):
        return kind
    if kind not in ("mlp", "linear"):
        raise LaraArgumentError(
            f"attach_lara: projector={kind!r}, but 'mlp', 'linear' or a module from the hidden width to "
            f"{latent_width} is expected"
        )
    if hidden_width is None:
        raise LaraArgumentError(
            "attach_lara: the width of the blocks' hidden state is unknown; "
            f"pass projector=nn.Linear(width, {latent_width}) or another module"
        )
    linear = partial(nn.Linear, dtype=torch.float32, device=device)
    if kind == "linear":
        return linear(hidden_width, latent_width)
    inner = 2 * hidden_width
    return nn.Sequential(linear(hidden_width, inner), nn.SiLU(), linear(inner, latent_width))


def trained_in_float32(module: nn.Module, name: str) -> None:
    """Make what trains in a 16-bit module float32, in place and with one line in the log.

    That is its trainable parameters and the buffers beside them; frozen parts stay.

    Args:
        module: the LAM or the projector.
        name: of the argument, for the log.
    """
    found: set[torch.dtype] = set()
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if not any(p.requires_grad and p.dtype in _HALF for p in own):
            continue
        for tensor in (*(p for p in own if p.requires_grad), *part.buffers(recurse=False)):
            if tensor.dtype in _HALF:
                found.add(tensor.dtype)
                tensor.data = tensor.data.float()
    if found:
        logger.warning(
            "attach_lara: %s= came in %s and trains, so its trainable parameters are float32 now: in 16 bits most "
            "optimizer steps are too small to change a weight",
            name, " and ".join(sorted(map(str, found))),
        )  # fmt: skip


def check_gradient(hidden: torch.Tensor, adapter: Any) -> None:
    """Check that the alignment reaches the policy; a policy of which nothing trains is warned of once.

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
    if not adapter.warned_of_frozen:
        adapter.warned_of_frozen = True
        logger.warning(
            "nothing of %s is trainable: LARA trains its projector and the LAM, and not the policy",
            type(adapter.policy).__name__,
        )


def read_values(terms: dict[str, Any]) -> dict[str, float]:
    """The scalars among the terms as plain floats, with one synchronisation with the device."""
    tensors = {name: term.detach() for name, term in terms.items() if isinstance(term, torch.Tensor) and not term.ndim}
    values = dict(zip(tensors, torch.stack([term.float() for term in tensors.values()]).tolist()))
    return {name: values.get(name, term) for name, term in terms.items() if name in values or isinstance(term, float)}


def stop_if_not_finite(
    hidden: torch.Tensor, terms: dict[str, Any], values: dict[str, float], step: torch.Tensor
) -> None:
    """Check the terms.

    Args:
        hidden: the policy's tapped state, for the message.
        terms: of the adapter's forward.
        values: of :func:`read_values`.
        step: 0-dim, training forwards so far.

    Raises:
        NonFiniteError: a LARA term is NaN or infinite; the message names the first one that is.
    """
    if math.isfinite(values["align"]) and math.isfinite(values["lam"]):
        return
    suspects = [
        ("the policy's hidden state", hidden),
        *((f"the LAM's {name}", terms[name]) for name in LAM_REPORT if name in terms),
        ("the LAM's latent action (latent_std)", terms["latent_std"]),
        ("the LAM's loss", terms["lam"]),
        ("the alignment loss", terms["align"]),
    ]
    first = next(name for name, value in suspects if not torch.isfinite(value.detach()).all())
    raise NonFiniteError(
        f"LARA: {first} is not finite at step {int(step) - 1}; stopped before it reaches a weight "
        f"(align {values['align']:.4g}, LAM {values['lam']:.4g})"
    )
