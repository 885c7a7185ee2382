"""Video whose actions nobody knows, beside demonstrations: LARA learns from it, the action loss does not.

python -m examples.by_feature.video_without_actions
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import attach_lara


def make_video(seed: int) -> dict[str, Tensor]:
    """Frames now and HORIZON steps later, as for demonstrations. The rest is made up: the policy needs some input."""
    batch = make_batch(seed=1000 + seed)
    batch["action"] = torch.randn_like(batch["action"])  # New: noise goes in, as at the start of acting
    batch["state"] = torch.zeros_like(batch["state"])  # New: the mean state; two of them would give the movement away
    return batch


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = arguments(__doc__, argv)
    policy = new_policy()
    lara = attach_lara(policy, new_lam(), layer=-3, alignment="contrastive", align_weight=0.1, lam_weight=0.1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    for step in range(args.steps):
        loss = policy(make_batch(seed=step))["loss"]
        policy(make_video(step))  # New: the loss on made-up actions is not used,
        loss = loss + lara.losses.total  # New: what LARA makes of the frames is
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"alignment on video {float(lara.losses.align.detach()):.3f}")


if __name__ == "__main__":
    main()
