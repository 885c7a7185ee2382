"""The contrastive alignment, its temperature, the gradient into the LAM, and a schedule of the weight.

python -m examples.by_feature.contrastive
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import Contrastive, attach_lara
from lara_adapter.schedules import Warmup


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = arguments(__doc__, argv)
    policy = new_policy()
    lara = attach_lara(
        policy,
        new_lam(),
        layer=-3,
        alignment=Contrastive(temperature=0.1),  # New: or "contrastive"; a constant latent cannot satisfy it
        lam_grad_scale=0.3,  # New: less of the alignment's gradient into the LAM keeps more of its codes
        align_weight=Warmup(0.1, steps=5),  # New: a float, a schedule, or a callable(step)
        lam_weight=0.1,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    for step in range(args.steps):
        loss = policy(make_batch(rows=16, seed=step))["loss"]  # negatives are the other samples of the forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shown = lara.metrics()
    print({name: round(shown[name], 3) for name in ("align_loss", "mean_direction", "perplexity")})


if __name__ == "__main__":
    main()
