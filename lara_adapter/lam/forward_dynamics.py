"""Forward dynamics: the future frame from the present one and the quantised latent action (LARA, Section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LatentActionConfig
from .transformer import TransformerLayer, as_parameter, initialize

__all__ = ["ForwardDynamics"]


class ForwardDynamics(nn.Module):
    """I^_{t+C} = FDM(I_t, z^q): a ViT over the patches of I_t, conditioned on the latent action.

    The latent tokens are projected up (Linear(D, D) - tanh - Linear(D, W)) and fused: "add" flattens all N through one
    Linear(N W, W) and adds the result to every patch; "concat" puts them in front of the patches. A linear map and a
    pixel shuffle turn the last tokens into pixels.
    """

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch, count = config.fdm_width, config.fdm_patch_size, config.queries
        self.grid = config.image_size // patch
        patches = self.grid**2
        self.up = nn.Sequential(
            nn.Linear(config.latent_dim, config.latent_dim), nn.Tanh(), nn.Linear(config.latent_dim, width)
        )
        self.fuse = nn.Linear(count * width, width) if config.fusion == "add" else None
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.mask_token = as_parameter(1, 1, width) if config.mask_token else None
        length = patches * (2 if config.mask_token else 1) + (count if config.fusion == "concat" else 0)
        self.positions = as_parameter(1, length, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.fdm_heads, config.fdm_mlp, config.layer_norm_eps)
            for _ in range(config.fdm_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, 3 * patch * patch)
        initialize(self, config.initializer_range)
        nn.init.trunc_normal_(self.positions, std=config.fdm_position_range)
        if config.residual:
            # start as the copy of the present frame: the baseline that is hard to reach otherwise
            nn.init.zeros_(self.head.weight)

    def forward(self, frame: Tensor, latent: Tensor) -> Tensor:
        """Predict the future frame.

        Args:
            frame: [B, 3, S, S] float, [0, 1], at `image_size`.
            latent: [B, N, D] float, quantised latent tokens.

        Returns:
            [B, 3, S, S] float32; aims at [0, 1] and is not clamped.
        """
        dtype = self.patch_embedding.weight.dtype
        batch = frame.shape[0]
        tokens = self.patch_embedding(frame.to(dtype)).flatten(2).transpose(1, 2)
        patches = tokens.shape[1]
        if self.mask_token is not None:
            tokens = torch.cat([tokens, self.mask_token.expand(batch, patches, -1)], dim=1)
        raised = self.up(latent.to(dtype))
        if self.fuse is not None:
            tokens = tokens + self.fuse(raised.flatten(1)).unsqueeze(1)
        else:
            tokens = torch.cat([raised, tokens], dim=1)
        tokens = tokens + self.positions
        for layer in self.layers:
            tokens, _ = layer(tokens)
        pixels = self.head(self.norm(tokens[:, -patches:])).float()
        image = pixels.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        image = F.pixel_shuffle(image, self.config.fdm_patch_size)
        return frame.float() + image if self.config.residual else image
