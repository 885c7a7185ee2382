"""A policy with names of its own: a row of the policy table says what cannot be guessed.

python -m examples.by_feature.custom_policy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import PolicySpec, attach_lara


class OddPolicy(nn.Module):
    """Trains by `compute_loss`, calls its actions `chunk` and its loss `flow`, and marks padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = new_policy()

    def compute_loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss, under a name of its own."""
        real = (~batch["is_pad"])[..., None].expand_as(batch["chunk"])
        return {"flow": self.inner({**batch, "action": batch["chunk"], "action_mask": real.float()})["loss"]}


SPEC = PolicySpec("odd", entry="compute_loss", action="chunk", padding="is_pad", loss="flow")  # New


def main(argv: Sequence[str] | None = None) -> None:
    """Check, and train."""
    args = arguments(__doc__, argv)
    batch = make_batch()
    batch["chunk"] = batch.pop("action")
    batch["is_pad"] = torch.arange(batch["chunk"].shape[1]) >= torch.tensor([8, 8, 8, 8, 6, 6, 5, 4])[:, None]
    del batch["action_mask"]
    policy = OddPolicy()
    lara = attach_lara(policy, new_lam(), layer=-3, spec=SPEC)  # New: for this call; register_policy is for all
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    report = lara.check(batch, optimizer)  # New: moves actions and samples, and proves which token is aligned
    print(report)
    policy.train()
    for _ in range(args.steps):
        loss = policy.compute_loss(batch)["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"cosine {lara.metrics()['cosine']:.3f}; the last valid token of every sample is aligned: {report.proven}")


if __name__ == "__main__":
    main()
