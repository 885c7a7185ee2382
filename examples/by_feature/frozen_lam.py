"""A frozen LAM (LARA, Eq. 5): the baseline that joint training must beat.

python -m examples.by_feature.frozen_lam
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.by_feature.world import arguments, new_lam, new_policy, train
from lara_adapter import attach_lara


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and show that the LAM did not."""
    args = arguments(__doc__, argv)
    policy, lam = new_policy(), new_lam()
    before = {name: value.clone() for name, value in lam.state_dict().items()}
    lara = attach_lara(policy, lam, layer=-3, train_lam=False)  # New
    train(policy, args.steps)
    same = all(torch.equal(value, before[name]) for name, value in lam.state_dict().items())
    print(f"cosine {lara.metrics()['cosine']:.3f}; the LAM is unchanged: {same}")


if __name__ == "__main__":
    main()
