"""Two cameras: each view's latent action is aligned, and the losses are averaged.

python -m examples.by_feature.several_views
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import attach_lara


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = arguments(__doc__, argv)
    policy = new_policy()
    lara = attach_lara(policy, new_lam(), layer=-3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    for step in range(args.steps):
        batch = make_batch(seed=step)
        front, wrist = batch["lara_frames"], make_batch(seed=1000 + step)["lara_frames"]
        batch["lara_frames"] = torch.stack([front, wrist], dim=1)  # New: [B, V, 2, 3, H, W]
        batch["lara_frames_valid"] = torch.arange(len(front)) > 0  # New: bool [B], False past the end of an episode
        loss = policy(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shown = lara.metrics()
    print(f"cosine {shown['cosine']:.3f} over two views; {shown['valid_fraction']:.0%} of the pairs count")


if __name__ == "__main__":
    main()
