"""Stop, and go on bit for bit: the policy's state_dict and the optimizer hold LARA's part.

python -m examples.by_feature.resume
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import LaraAdapter, attach_lara


def begin() -> tuple[nn.Module, LaraAdapter, torch.optim.Optimizer]:
    """A policy with LARA, and its optimizer."""
    torch.manual_seed(0)
    policy = new_policy().train()
    lara = attach_lara(policy, new_lam(), layer=-3)
    return policy, lara, torch.optim.AdamW(policy.parameters(), lr=1e-3)


def train(policy: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """An ordinary loop, with the random numbers of each step fixed."""
    for step in steps:
        torch.manual_seed(step)
        loss = policy(make_batch(seed=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> None:
    """Train once through, and once with a stop; compare."""
    args = arguments(__doc__, argv)
    half, file = args.steps // 2, args.output / "resume.pt"
    whole, _, optimizer = begin()
    train(whole, optimizer, range(args.steps))

    policy, _, optimizer = begin()
    train(policy, optimizer, range(half))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}, file)

    policy, lara, optimizer = begin()  # New: attach_lara first, then load
    state = torch.load(file, weights_only=True)
    policy.load_state_dict(state["policy"])  # New: with projector, LAM and LARA's step
    optimizer.load_state_dict(state["optimizer"])
    print("goes on at step", lara.step)
    train(policy, optimizer, range(half, args.steps))
    after = policy.state_dict()
    print("the same weights:", all(torch.equal(value, after[name]) for name, value in whole.state_dict().items()))


if __name__ == "__main__":
    main()
