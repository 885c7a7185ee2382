"""Vector quantisation of the latent tokens (LARA, Eq. 3; VQ-VAE), with safeguards against a collapsed codebook.

The codebook learns by gradient, which DDP synchronises. Everything else (usage, initial values from data, revival of
unused codes) is computed from sums over all ranks, and so is equal on each; it draws no random numbers and never
branches on a tensor's value, so that it can be compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LaraArgumentError
from .config import LatentActionConfig

__all__ = ["QuantizerTerms", "VectorQuantizer"]

# A code is dead when its running share of the latents falls below this part of 1 / K.
_DEAD_SHARE = 0.1


class QuantizerTerms(NamedTuple):
    """The parts of the quantiser's loss and its usage, all float32 scalars.

    `codebook_loss` and `commitment_loss` have the same value; the first moves the codes, the second moves z.
    """

    codebook_loss: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    codes_used: Tensor


class VectorQuantizer(nn.Module):
    """Nearest code in float32, straight-through gradient, codebook and commitment terms.

    The codes in use are `weight + offset`: `weight` is the parameter, `offset` a buffer through which codes are set
    from data. A forward never writes to a parameter: FSDP and ZeRO-3 would discard the write with the gathered copy,
    and autograd would refuse a second forward before the backward.

    Args:
        codebook_size: K.
        dim: D, width of a code.
        commitment_weight: beta >= 0.
        legacy_commitment: beta weighs the codebook term instead of the commitment term (the official code).
        warmup_steps: training forwards that return z itself; then the codes are set from data.
        init_from_data: set the codes from the first forward's data even with `warmup_steps` 0.
        revive_every: training forwards between two revivals of dead codes; 0: never.
        usage_decay: decay per training forward of the running usage, in [0, 1).
    """

    def __init__(
        self,
        codebook_size: int = 128,
        dim: int = 32,
        commitment_weight: float = 0.25,
        *,
        legacy_commitment: bool = False,
        warmup_steps: int = 0,
        init_from_data: bool = False,
        revive_every: int = 0,
        usage_decay: float = 0.95,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1 or warmup_steps < 0 or revive_every < 0 or not 0 <= usage_decay < 1:
            raise LaraArgumentError(
                f"VectorQuantizer: codebook_size={codebook_size}, dim={dim}, warmup_steps={warmup_steps}, "
                f"revive_every={revive_every}, usage_decay={usage_decay} are outside their ranges"
            )
        self.codebook_size, self.dim = codebook_size, dim
        self.commitment_weight, self.legacy_commitment = commitment_weight, legacy_commitment
        self.warmup_steps, self.revive_every, self.usage_decay = warmup_steps, revive_every, usage_decay
        codes = torch.empty(codebook_size, dim, dtype=torch.float32)
        self.weight = nn.Parameter(codes.uniform_(-1 / codebook_size, 1 / codebook_size))
        self.register_buffer("offset", torch.zeros(codebook_size, dim, dtype=torch.float32))
        self.register_buffer("usage", torch.full((codebook_size,), 1 / codebook_size, dtype=torch.float32))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # an integer and not a bool: DDP broadcasts buffers, and not every backend takes bools
        self._starts_ready = warmup_steps == 0 and not init_from_data
        self.register_buffer("ready", torch.tensor(int(self._starts_ready)))
        self.offset: Tensor
        self.usage: Tensor
        self.step: Tensor
        self.ready: Tensor

    @classmethod
    def from_config(cls, config: LatentActionConfig) -> VectorQuantizer:
        """The quantiser with a model's settings."""
        return cls(
            config.codebook_size, config.latent_dim, config.commitment_weight,
            legacy_commitment=config.legacy_commitment, warmup_steps=config.vq_warmup_steps,
            init_from_data=config.vq_init_from_data, revive_every=config.vq_revive_every,
            usage_decay=config.vq_usage_decay,
        )  # fmt: skip

    def forward(
        self,
        z: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        update: bool = True,
        want_loss: bool = True,
        want_terms: bool = False,
    ) -> tuple[Any, ...]:
        """Quantise latents, or look up codes.

        Args:
            z: [B, N, D] float.
            valid: [B] bool; latents of other samples are replaced by zeros and do not count for loss and usage.
            indices: [..., any] int64 in 0..K-1: look these up instead, and return only the codes [..., D].
            update: False: usage and codes do not change, even in training.
            want_loss: False: return only quantized and indices, and change nothing.
            want_terms: append the :class:`QuantizerTerms`.

        Returns:
            quantized [B, N, D] float32 (straight-through: its gradient is z's; during warm-up it is z itself),
            indices [B, N] int64, loss (float32 scalar; 0 during warm-up).
        """
        codebook = self.weight.float() + self.offset.float()
        if z is None:
            assert indices is not None, "either z or indices"
            return (F.embedding(indices, codebook),)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if valid is not None:
                z = torch.where(valid[:, None, None], z, 0.0)
            with torch.no_grad():
                # not the faster |z|^2 - 2 z e + |e|^2: that cancels when codes are close, and may run in TF32
                distance = torch.cdist(z.flatten(0, 1), codebook, compute_mode="donot_use_mm_for_euclid_dist")
                indices = distance.argmin(dim=1).view(z.shape[:2])
            codes = F.embedding(indices, codebook)
            quantized = z + (codes - z).detach()
            if not self._starts_ready:
                quantized = torch.where(self.ready > 0, quantized, z)
            if not want_loss:
                return quantized, indices
            weights = self._weights(z, valid)
            codebook_loss = torch.dot(F.mse_loss(codes, z.detach(), reduction="none").mean(dim=(1, 2)), weights)
            commitment_loss = torch.dot(F.mse_loss(codes.detach(), z, reduction="none").mean(dim=(1, 2)), weights)
            if self.legacy_commitment:
                loss = commitment_loss + self.commitment_weight * codebook_loss
            else:
                loss = codebook_loss + self.commitment_weight * commitment_loss
            # in eval mode, under no_grad and with a frozen codebook nothing may change
            if update and self.training and torch.is_grad_enabled() and self.weight.requires_grad:
                self._refresh(z.detach().flatten(0, 1), indices.flatten(), self._rows(z, valid))
            if not want_terms:
                return quantized, indices, loss
            usage = self.usage.float()
            share = usage / usage.sum()
            perplexity = torch.special.entr(share).sum().exp()
            codes_used = (share >= _DEAD_SHARE / self.codebook_size).sum().float()
            return quantized, indices, loss, QuantizerTerms(codebook_loss, commitment_loss, perplexity, codes_used)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes [..., D] float32 of indices [...] int64."""
        return self(indices=indices)[0]

    def _weights(self, z: Tensor, valid: Tensor | None) -> Tensor:
        """[B], of the dtype of z: the product with them is the mean over the samples that count; all 0 during warm-up."""
        if valid is None:
            weights = torch.full(z.shape[:1], 1 / len(z), dtype=z.dtype, device=z.device)
        else:
            weights = valid.to(z.dtype) / valid.sum().clamp(min=1)
        return weights if self._starts_ready else weights * (self.ready > 0)

    @staticmethod
    def _rows(z: Tensor, valid: Tensor | None) -> Tensor:
        """Which of the B * N latents count, [B * N] bool."""
        if valid is None:
            return torch.ones(z.shape[0] * z.shape[1], dtype=torch.bool, device=z.device)
        return valid.repeat_interleave(z.shape[1])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """As nn.Module's; the weights may be from a warm-up that the settings here do not know of."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        ready = state_dict.get(prefix + "ready")
        if ready is not None and not ready.is_meta:
            self._starts_ready = self._starts_ready and bool(ready > 0)

    @torch.no_grad()
    def _refresh(self, latents: Tensor, indices: Tensor, rows: Tensor) -> None:
        """Count the codes, and set codes from data: all at the end of the warm-up, later the dead ones.

        Only this method writes, and the same on all ranks: one sum over ranks carries the counts and each rank's
        candidates in its own slot (a sum with zeros is exact).

        Args:
            latents: [M, D] float32 of this rank.
            indices: [M] int64, their codes.
            rows: [M] bool, which of them count.
        """
        size, dim = self.codebook_size, self.dim
        # at each forward: the model is usually built before init_process_group
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        counts = latents.new_zeros(size).scatter_add_(0, indices, rows.to(latents.dtype))
        if self._starts_ready and not self.revive_every:  # then no code is ever set from data
            if ranks > 1:
                dist.all_reduce(counts)
            total = counts.sum()
            some = total > 0
            self.step.add_(some)
            running = self.usage.float().lerp(counts / total.clamp(min=1), (1 - self.usage_decay) * some)
            self.usage.copy_(running)
            return
        share = -(-size // ranks)
        candidates, found = _spread(latents, rows, share)
        if ranks > 1:
            slots = latents.new_zeros(ranks, share * dim + 1)
            slots[dist.get_rank()] = torch.cat([candidates.flatten(), found.float().view(1)])
            message = torch.cat([counts, slots.flatten()])
            dist.all_reduce(message)
            counts, slots = message[:size], message[size:].view(ranks, -1)
            candidates = slots[:, :-1].reshape(ranks * share, dim)
            candidates, found = _spread(candidates, slots[:, -1].repeat_interleave(share) > 0, size)
        total = counts.sum()
        some, was_ready = total > 0, self.ready > 0
        ready = was_ready & some
        usage = self.usage.float().lerp(counts / total.clamp(min=1), (1 - self.usage_decay) * ready)
        self.step.add_(some)  # else a revival would be due on batches without a latent, and never happen
        first = ~was_ready & (self.step >= self.warmup_steps) & found
        replaced = first.expand(size)
        if self.revive_every:
            due = ready & (self.step % self.revive_every == 0)
            replaced = replaced | (due & (usage * size < _DEAD_SHARE))
        order = (replaced.cumsum(0) - 1).clamp(min=0)
        offset = candidates[order] - self.weight.float()
        self.offset.copy_(torch.where(replaced[:, None], offset, self.offset.float()))
        self.usage.copy_(torch.where(replaced, 1 / size, usage))
        self.ready.copy_(torch.maximum(self.ready, first.to(self.ready.dtype)))


def _spread(latents: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose `count` of the latents [M, D] where `rows` [M] is True, evenly and without random numbers.

    Returns:
        [count, D], with repeats only if there are fewer; and whether there was any, a bool scalar.
    """
    # A plain stride would pick the same few of the N tokens in each sample. Multiplying by 2^32 / golden ratio
    # (Knuth's hash) orders the rows so that any stretch of them is spread over samples and tokens.
    place = torch.arange(latents.shape[0], device=latents.device)
    order = torch.where(rows, place * 2654435769 % 2**32, place + 2**32).argsort()
    available = rows.sum()
    picks = order[torch.arange(count, device=latents.device) * available // count]
    return latents[picks], available > 0
