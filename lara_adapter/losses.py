"""Alignment losses between the policy's projected hidden state and the latent action: LARA, Eq. 6, and ours.

Every alignment maps `projected` [B, W] and `latent` [B, W] (float32) to one loss per sample [B]; smaller is better.
Gradients flow into both arguments; :func:`scale_gradient` sets how much reaches the latent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed as dist

from .errors import AdapterFormatError, LaraArgumentError

__all__ = ["Alignment", "Contrastive", "CosineDistance", "masked_mean", "most_of_ranks",
           "resolve_alignment", "scale_gradient"]  # fmt: skip

Alignment = Callable[..., torch.Tensor]

# a shorter latent has no direction: that of a pair in which nothing moves is zero with `subtract_still`, and the gradient
# of a cosine grows as 1 / length
_SHORTEST = 1e-2


@dataclass(frozen=True)
class CosineDistance:
    """`1 - cos(projected, latent)` in [0, 2]: LARA, Eq. 6, up to the constant 1 that the official release adds.

    It has a trivial solution when the LAM trains too: a latent with a large constant part, which any projector
    predicts. A value near 0 therefore does not show alignment; see `mean_direction` in `lara.metrics()`.
    """

    def __call__(
        self, projected: torch.Tensor, latent: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss per sample [..., B], of arguments that broadcast; `valid` is not needed."""
        return 1 - F.cosine_similarity(projected, latent, dim=-1, eps=_SHORTEST)


@dataclass(frozen=True)
class Contrastive:
    """In-batch InfoNCE on cosine similarity, both directions averaged, times `scale`.

    A constant latent cannot satisfy it, so it does not collapse the LAM. The negatives are all other valid samples of the
    batch, of every rank when torch.distributed is initialised (with exact gradients across ranks). Near-duplicates,
    frames of one episode a few steps apart, are kept: they share the background and differ in the motion, and only
    raise the floor of the loss. Leaving out negatives by similarity would bring back the collapse. Shuffle batches over
    episodes.

    Attributes:
        temperature: divides the cosine; > 0.
        scale: factor on the cross-entropy, so that one weight w1 suits this and the cosine; > 0.
    """

    temperature: float = 0.1
    scale: float = 0.2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise LaraArgumentError(f"Contrastive: {name}={value!r}, but a finite number > 0 is expected")

    def __call__(
        self, projected: torch.Tensor, latent: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss per sample [B]; see :meth:`compare`."""
        return self.compare(projected, latent, valid)[0]

    def compare(
        self, projected: torch.Tensor, latent: torch.Tensor, valid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss per sample [..., B], and the number of samples [...] that are compared with each other, of all ranks.

        Leading dimensions are comparisons on their own, made in one go: one exchange between ranks serves all.

        Args:
            projected: [..., B, W] float32.
            latent: [..., B, W] float32.
            valid: [..., B] bool; invalid samples are not negatives, and their own loss is meaningless.
        """
        shape = projected.shape[:-1]
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=projected.device)
        p, z = (F.normalize(each, dim=-1, eps=_SHORTEST).reshape(-1, *each.shape[-2:]) for each in (projected, latent))
        all_p, all_z, all_valid, start = _gather(p, z, valid.reshape(p.shape[:2]))
        own = torch.arange(shape[-1], device=p.device) + start
        # a sample keeps its own positive, or its row of logits would be empty
        itself = torch.arange(all_z.shape[1], device=p.device) == own[:, None]
        blocked = torch.where(all_valid[:, None] | itself, 0.0, float("-inf"))
        own = own.expand(len(p), -1)
        forward = F.cross_entropy((p @ all_z.mT / self.temperature + blocked).mT, own, reduction="none")
        backward = F.cross_entropy((z @ all_p.mT / self.temperature + blocked).mT, own, reduction="none")
        return (self.scale * 0.5 * (forward + backward)).view(shape), all_valid.sum(1).view(shape[:-1])


def _gather(
    p: torch.Tensor, z: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Samples [C, B, W] of all ranks, and the index of this rank's first one; ranks may have different numbers B."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return p, z, valid, 0
    from torch.distributed.nn.functional import all_gather

    size, width = p.shape[1:]
    counts = [torch.zeros((), dtype=torch.long, device=p.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(size, device=p.device))
    most = int(torch.stack(counts).max())
    # the flags are one more column; padding rows are invalid
    packed = F.pad(torch.cat([p, z, valid[..., None].to(p.dtype)], dim=-1), (0, 0, 0, most - size))
    # differentiable: its backward sums over ranks, so that after DDP's mean each parameter has the gradient of the
    # mean of all ranks' losses
    # (the group is named: the default is whatever group existed when that module was first imported)
    everything = torch.cat(all_gather(packed, group=dist.group.WORLD), dim=1)
    flags = everything[..., -1].detach() > 0.5
    return everything[..., :width], everything[..., width:-1], flags, most * dist.get_rank()


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest `count` of all ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


_KINDS: dict[str, type[CosineDistance] | type[Contrastive]] = {"cosine": CosineDistance, "contrastive": Contrastive}


def resolve_alignment(alignment: str | Alignment | Mapping[str, Any]) -> tuple[Alignment, Any]:
    """An alignment and its form in a configuration.

    Args:
        alignment: "cosine", "contrastive", a callable(projected, latent) -> [B], or the JSON form of one.

    Returns:
        A callable(projected, latent, valid) -> [B], and its JSON form (None for a user's callable).

    Raises:
        LaraArgumentError: none of these.
        AdapterFormatError: a mapping with unknown entries.
    """
    if isinstance(alignment, Mapping):
        rest = dict(alignment)
        kind = _KINDS.get(str(rest.pop("name", None)))
        try:
            if kind is None:
                raise TypeError("unknown name")
            alignment = kind(**rest)
        except TypeError as error:
            raise AdapterFormatError(f"{dict(rest)} is not an alignment ({error}); known: {sorted(_KINDS)}") from None
    elif isinstance(alignment, str):
        if alignment not in _KINDS:
            raise LaraArgumentError(
                f"attach_lara: alignment={alignment!r}, but one of {sorted(_KINDS)} or a callable(projected, latent) "
                "-> [B] is expected"
            )
        alignment = _KINDS[alignment]()
    if isinstance(alignment, (CosineDistance, Contrastive)):
        name = next(key for key, cls in _KINDS.items() if type(alignment) is cls)
        return alignment, {"name": name, **asdict(alignment)}
    if not callable(alignment):
        raise LaraArgumentError(f"attach_lara: alignment={alignment!r} is neither a name nor callable")
    return _UserAlignment(alignment), None


class _UserAlignment:
    """A user's callable with our signature; its result is checked."""

    def __init__(self, function: Alignment) -> None:
        self.function = function
        try:
            self.takes_valid = "valid" in inspect.signature(function).parameters
        except (TypeError, ValueError):
            self.takes_valid = False

    def __call__(
        self, projected: torch.Tensor, latent: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = self.function(projected, latent, **({"valid": valid} if self.takes_valid else {}))
        if not isinstance(loss, torch.Tensor) or list(loss.shape) != [len(projected)]:
            got = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise LaraArgumentError(
                f"alignment= callable returned {got}, but one loss per sample [{len(projected)}] is expected"
            )
        return loss


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The same values, bit for bit, with the gradient multiplied by `factor`."""
    if factor == 1:
        return tensor
    values = tensor.detach()
    return values if factor == 0 else values + factor * (tensor - values)


def masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `valid`, of the same shape; 0, with the graph kept, if there are none."""
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp_min(1)
