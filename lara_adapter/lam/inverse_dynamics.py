"""Inverse dynamics: which latent action leads from the present frame to the future one (LARA, Section 3).

The M-Former of Moto, which LARA adopts: learnt queries read the encodings of both frames through a pre-norm
transformer encoder; what leaves at the queries is projected down to the latent tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LatentActionConfig
from .transformer import TransformerLayer, as_parameter, initialize

__all__ = ["InverseDynamics"]


class InverseDynamics(nn.Module):
    """z = IDM(I_t, I_{t+C}) from image tokens.

    The sequence is [N queries, P present tokens, separator, P future tokens]; one position is learnt for each. With
    `difference_input` the tokens of the difference image have their own projection and are added to the future tokens
    of the same place, so that the sequence, its cost and the attention maps keep their shape. With `subtract_still` it
    runs on (I_t, I_t) too, as more rows of the same batch, and the difference of the two is the latent.
    """

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        width, count = config.idm_width, config.queries
        self.queries = as_parameter(1, count, width)
        self.separator = as_parameter(1, 1, width)
        self.projection = nn.Linear(config.encoder_width, width)
        self.difference_projection = nn.Linear(config.encoder_width, width) if config.difference_input else None
        self.positions = as_parameter(1, count + 1 + 2 * config.encoder_tokens, width)
        self.token_types = as_parameter(2, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.idm_heads, config.idm_mlp, config.layer_norm_eps)
            for _ in range(config.idm_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.down = nn.Sequential(
            nn.Linear(width, config.fdm_width), nn.Tanh(), nn.Linear(config.fdm_width, config.latent_dim)
        )
        initialize(self, config.initializer_range)
        nn.init.trunc_normal_(self.positions, std=config.idm_position_range)

    def forward(
        self,
        present: Tensor,
        future: Tensor,
        difference: Tensor | None = None,
        nothing: Tensor | None = None,
        want_attention: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Infer the latent tokens.

        Args:
            present: [B, P, E] tokens of I_t.
            future: [B, P, E] tokens of I_{t+C}.
            difference: [B, P, E] tokens of the difference image; wanted exactly with `difference_input`.
            nothing: [1, P, E] tokens of the difference image of two equal frames; wanted with `subtract_still` too.
            want_attention: also return what the queries look at.

        Returns:
            Latent tokens [B, N, D] float32, not quantised; and attention [B, layers, heads, N, 2, h, w] float32 over
            the patches of (present, future), an empty tensor if not wanted. A row sums to less than 1: the rest went
            to queries, separator and prefix tokens.
        """
        count, pairs = self.config.queries, len(present)
        if self.config.subtract_still:
            if difference is not None and nothing is not None:
                difference = torch.cat([difference, nothing.to(difference.dtype).expand_as(difference)])
            present, future = torch.cat([present, present]), torch.cat([future, present])
        sequence = self._embed(present, future, difference)
        maps = []
        for depth, layer in enumerate(self.layers):
            # only the queries leave the encoder, so the last layer need not update the image tokens
            last = depth + 1 == len(self.layers)
            sequence, weights = layer(sequence, count if last else None, want_attention)
            maps.append(weights)
        latent = self.down(self.norm(sequence)).float()
        if self.config.normalize_latent:
            with torch.autocast(latent.device.type, enabled=False):
                latent = F.layer_norm(latent, (self.config.latent_dim,))
        if self.config.subtract_still:
            # after the norm, which would blow up the small difference of a pair that hardly moves
            latent, maps = latent[:pairs] - latent[pairs:], [weights[:pairs] for weights in maps]
        return latent, self._over_patches(maps) if want_attention else latent.new_empty(0)

    def _embed(self, present: Tensor, future: Tensor, difference: Tensor | None) -> Tensor:
        """Build the sequence [B, N + P + 1 + P, W]."""
        # the frozen encoder stays float32 when this model is cast
        dtype = self.projection.weight.dtype
        batch, count = present.shape[0], self.config.queries
        future_tokens = self.projection(future.to(dtype))
        if self.difference_projection is not None and difference is not None:
            future_tokens = future_tokens + self.difference_projection(difference.to(dtype))
        sequence = torch.cat(
            [
                self.queries.expand(batch, -1, -1),
                self.projection(present.to(dtype)),
                self.separator.expand(batch, -1, -1),
                future_tokens,
            ],
            dim=1,
        )
        head = count + present.shape[1] + 1
        second = 0 if self.config.legacy_token_types else 1
        types = torch.cat(
            [self.token_types[0].expand(head, -1), self.token_types[second].expand(future.shape[1], -1)], dim=0
        )
        return sequence + (self.positions + types)  # the small sum first: each one of the batch is a copy

    def _over_patches(self, maps: list[Tensor]) -> Tensor:
        """Cut the queries' rows and both frames' patch columns out of the attention maps."""
        config = self.config
        prefix, tokens, grid = config.encoder_prefix_tokens, config.encoder_tokens, config.encoder_grid
        rows = torch.stack([weights[:, :, : config.queries] for weights in maps], dim=1)
        start = config.queries + prefix
        present = rows[..., start : start + grid * grid]
        start += tokens + 1
        future = rows[..., start : start + grid * grid]
        return torch.stack([present, future], dim=4).unflatten(-1, (grid, grid))
