"""LARA in a training loop of your own.

python -m examples.by_feature.own_loop
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
    lara = attach_lara(policy, new_lam(), layer=-3)  # New: before the optimizer
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    print(lara.check(make_batch(), optimizer))  # New: is everything connected?
    policy.train()
    for step in range(args.steps):
        loss = policy(make_batch(seed=step))["loss"]  # L_ACT + w1 L_LARA + w2 L_LAM
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, round(float(loss.detach()), 4), round(lara.metrics()["cosine"], 3))  # New: metrics
    lara.detach()  # New: the policy is again what it was


if __name__ == "__main__":
    main()
