"""The pre-norm transformer layer that encoder, inverse and forward dynamics share, and how weights start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["TransformerLayer", "float32_default", "initialize", "scaled_dot_product_attention_with_weights"]


@contextlib.contextmanager
def float32_default(device: str | None = None) -> Iterator[None]:
    """A context in which new weights are float32, for hosts that load a policy under a 16-bit default dtype.

    Args:
        device: where they are; None: torch's default device.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def initialize(module: nn.Module, std: float) -> None:
    """Start weights as ViT does: truncated normal of `std` for matrices and tokens, biases 0, LayerNorm 1 and 0.

    Args:
        module: every parameter of it and of its children is written.
        std: standard deviation, > 0.
    """
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if isinstance(child, nn.LayerNorm):
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
            elif name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)


def scaled_dot_product_attention_with_weights(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with its map: what `F.scaled_dot_product_attention` computes and does not return.

    Args:
        query: [B, heads, R, d].
        key: [B, heads, T, d].
        value: [B, heads, T, d].

    Returns:
        Result [B, heads, R, d] in the dtype of `value`, and weights [B, heads, R, T] float32, each row summing to 1.
    """
    scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1)
    return (weights @ value.float()).to(value.dtype), weights


class TransformerLayer(nn.Module):
    """One pre-norm layer as in ViT: x + attention(norm(x)), then x + MLP(norm(x)), exact GELU, biases, no dropout.

    Args:
        width: W, of the tokens.
        heads: attention heads; divides `width`.
        mlp_width: hidden width of the MLP.
        eps: epsilon of both LayerNorms.

    Attributes:
        checkpointing: what the backward needs is computed again in it, and not kept.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.heads, self.checkpointing = heads, False
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(self, tokens: Tensor, rows: int | None = None, want_weights: bool = False) -> tuple[Tensor, Tensor]:
        """Update the tokens.

        Args:
            tokens: [B, T, W].
            rows: return only the first `rows` tokens; they attend to all T. Exact, and the others cost nothing.
            want_weights: also return the attention map, through an explicit softmax.

        Returns:
            Tokens [B, rows or T, W], and the map [B, heads, rows or T, T] float32 (an empty tensor if not wanted).
        """
        if self.checkpointing and torch.is_grad_enabled():
            # nothing is random in a layer
            call = partial(checkpoint, self._update, use_reentrant=False, preserve_rng_state=False)
            updated: tuple[Tensor, Tensor] = call(tokens, rows, want_weights)
            return updated
        return self._update(tokens, rows, want_weights)

    def _update(self, tokens: Tensor, rows: int | None, want_weights: bool) -> tuple[Tensor, Tensor]:
        rows = tokens.shape[1] if rows is None else rows
        normed = self.attention_norm(tokens)
        query = self._split(self.query(normed[:, :rows]))
        key, value = map(self._split, self.key_value(normed).chunk(2, dim=-1))
        if want_weights:
            mixed, weights = scaled_dot_product_attention_with_weights(query, key, value)
        else:
            mixed, weights = F.scaled_dot_product_attention(query, key, value), query.new_empty(0)
        tokens = tokens[:, :rows] + self.attention_output(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.mlp_norm(tokens)), weights

    def _split(self, tokens: Tensor) -> Tensor:
        """[B, T, W] to [B, heads, T, W / heads]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def as_parameter(*shape: int) -> nn.Parameter:
    """A parameter of this shape, to be filled by :func:`initialize`."""
    return nn.Parameter(torch.zeros(*shape))
