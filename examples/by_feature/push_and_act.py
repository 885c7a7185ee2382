"""Save the trained policy's adapter to a folder, or push it to the Hub; load it to act, and to train on.

python -m examples.by_feature.push_and_act --repo user/my-policy-lara      # without --repo: a folder only
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy, train
from lara_adapter import attach_lara, load_lara


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save or push, act."""
    args = arguments(__doc__, argv, repo="Hub repository to push to, user/name")
    policy = new_policy()
    base = {name: value.clone() for name, value in policy.state_dict().items()}
    lara = attach_lara(policy, new_lam(), layer=-3)
    train(policy, args.steps)

    source, revision = str(args.output / "push_and_act"), None
    lara.save_pretrained(source, save_policy="trainable")  # New: with what was trained of the policy
    if args.repo:
        url = lara.push_to_hub(args.repo, save_policy="trainable", private=True)  # New: one commit
        source, revision = args.repo, url.rsplit("/", 1)[-1]

    fresh = new_policy()
    fresh.load_state_dict(base)  # the base policy, as it is published
    acting = load_lara(fresh, source, revision=revision, inference=True)  # New: no part of LARA is in it
    noise, seen = torch.randn(2, 8, 2), make_batch(2)
    same = torch.equal(acting.get_action(seen, noise), policy.eval().get_action(seen, noise))
    print(f"loaded from {source}: acts the same: {same}")


if __name__ == "__main__":
    main()
