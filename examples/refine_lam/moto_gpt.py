"""A small policy after Moto-GPT (arXiv 2412.04445): it generates the coming latent action's codes, then the actions.

One sequence: image tokens and a task token, the N codes of the latent action of the coming chunk, and one query per
action. Codes are predicted autoregressively (from a begin token), which can be learnt from video without actions.
Fine-tuning adds the action queries; they see the codes in half of the samples, as in Moto, so that the policy does not
depend on them alone. To act, it first generates the codes greedily.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.mini_vla import Attention, Backbone, MiniVLAConfig


@dataclasses.dataclass(frozen=True)
class MotoGPTConfig:
    """Sizes of the policy; the defaults make 0.75 million parameters."""

    action_dim: int = 4
    horizon: int = 16  # actions per chunk
    num_tasks: int = 2
    image_size: int = 64
    codes: int = 8  # latent tokens per chunk
    codebook_size: int = 128
    use_codes: bool = True  # False: actions directly from image and task, the reference without latent actions
    width: int = 96
    depth: int = 4
    heads: int = 4
    see_codes: float = 0.5  # share of the training samples whose action queries see the codes (Moto masks as many)
    action_weight: float = 100.0  # of the smooth L1 loss of the actions, beside the cross-entropy of the codes (Moto)


class Block(nn.Module):
    """Attention and a feed-forward network, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run one block: x [B, N, D], mask [B or 1, 1, N, N] bool -> [B, N, D]."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class MotoGPT(nn.Module):
    """The policy: `forward` trains, `generate` writes codes, `get_action` acts."""

    def __init__(self, config: MotoGPTConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.backbone = Backbone(MiniVLAConfig(num_tasks=config.num_tasks, image_size=config.image_size, width=width))
        self.code = nn.Embedding(config.codebook_size + 1, width)  # the last one is the begin token
        self.query = nn.Parameter(0.02 * torch.randn(1, config.horizon, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + config.codes, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.code_head = nn.Linear(width, config.codebook_size)
        self.action_head = nn.Linear(width, config.action_dim)

    def run(
        self, context: Tensor, codes: Tensor, queries: bool, see_codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the transformer.

        Args:
            context: [B, M, D] tokens of image and task.
            codes: [B, n] int64: the first n codes, n <= `config.codes`.
            queries: whether to append the action queries.
            see_codes: [B] bool: samples whose queries may attend to the codes; None: all.

        Returns:
            Logits [B, 1 + n, K] of the code after each, the begin token first; actions [B, T, A], T = 0 without queries.
        """
        size, number = codes.shape
        begin = torch.full((size, 1), self.config.codebook_size, device=codes.device)
        code_tokens = self.code(torch.cat([begin, codes], 1)) + self.position[:, : 1 + number]
        query_tokens = self.query.expand(size, -1, -1) if queries else context[:, :0]
        x = torch.cat([context, code_tokens, query_tokens], 1)
        mask = self.mask(context.shape[1], number, query_tokens.shape[1], see_codes, x.device)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm_out(x)
        last = context.shape[1] + 1 + number
        return self.code_head(x[:, context.shape[1] : last]), self.action_head(x[:, last:])

    @staticmethod
    def mask(context: int, codes: int, queries: int, see_codes: Tensor | None, device: torch.device) -> Tensor:
        """Mask [B or 1, 1, N, N] bool: all attend to the observation, codes to earlier codes, queries to everything."""
        size = context + 1 + codes + queries
        allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()
        allowed[:context, :context] = True
        allowed[size - queries :, size - queries :] = True
        allowed = allowed[None, None]
        if see_codes is not None and queries:
            allowed = allowed.repeat(len(see_codes), 1, 1, 1)
            allowed[:, 0, size - queries :, context + 1 : context + 1 + codes] = see_codes[:, None, None]
        return allowed

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            batch: `image` [B, 3, H, W] uint8, `task` [B] int64, `codes` [B, N] int64 of the coming chunk, `valid` [B]
                bool, False where there are none (end of the episode). To fine-tune also `action` [B, T, A] in [-1, 1] and
                `action_mask` [B, T, A], 1 where the action is real.

        Returns:
            `loss`, `code_loss` (mean cross-entropy in nats), and with actions `action_loss` (smooth L1).
        """
        config, codes, valid = self.config, batch["codes"], batch["valid"]
        fine_tune = "action" in batch
        see = (
            valid & (torch.rand(len(valid)) < config.see_codes).to(valid.device) if config.use_codes else valid & False
        )
        logits, action = self.run(self.backbone([batch["image"]], batch["task"]), codes, fine_tune, see)
        surprise = F.cross_entropy(logits[:, :-1].flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape)
        losses = {"code_loss": (surprise.mean(1) * valid).sum() / valid.sum().clamp_min(1)}
        losses["loss"] = losses["code_loss"] if config.use_codes else 0 * losses["code_loss"]
        if fine_tune:
            mask = batch["action_mask"]
            error = F.smooth_l1_loss(action, batch["action"], reduction="none") * mask
            losses["action_loss"] = error.sum() / mask.sum().clamp_min(1)
            losses["loss"] = losses["loss"] + config.action_weight * losses["action_loss"]
        return losses

    @torch.no_grad()
    def generate(self, image: Tensor, task: Tensor) -> Tensor:
        """Generate the codes of the coming chunk: image [B, 3, H, W] uint8, task [B] int64 -> [B, N] int64."""
        return self._generate(self.backbone([image], task))

    def _generate(self, context: Tensor) -> Tensor:
        codes = torch.zeros(len(context), 0, dtype=torch.long, device=context.device)
        while codes.shape[1] < self.config.codes:
            logits, _ = self.run(context, codes, queries=False)
            codes = torch.cat([codes, logits[:, -1:].argmax(-1)], 1)
        return codes

    @torch.no_grad()
    def get_action(self, observation: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Generate the codes, then predict the actions.

        Args:
            observation: `image` [B, 3, H, W] uint8 and `task` [B] int64; other keys are ignored.
            noise: ignored: this policy is deterministic.

        Returns:
            [B, T, A] float: actions, clipped to [-1, 1].
        """
        context = self.backbone([observation["image"]], observation["task"])
        if self.config.use_codes:
            codes, see = self._generate(context), None
        else:
            codes = torch.zeros(len(context), self.config.codes, dtype=torch.long, device=context.device)
            see = torch.zeros(len(context), dtype=torch.bool, device=context.device)
        return self.run(context, codes, True, see)[1].clamp(-1, 1)

    def save(self, file: Path) -> None:
        """Save weights and settings."""
        torch.save({"config": dataclasses.asdict(self.config), "state": self.state_dict()}, file)

    @classmethod
    def load(cls, file: Path) -> MotoGPT:
        """Load what :meth:`save` wrote, in eval mode."""
        content = torch.load(file, weights_only=True)
        policy = cls(MotoGPTConfig(**content["config"]))
        policy.load_state_dict(content["state"])
        return policy.eval()
