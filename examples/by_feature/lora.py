"""LARA on a policy that trains by LoRA; the adapter's folder then holds the LoRA weights too.

pip install -e ".[train]" && python -m examples.by_feature.lora
"""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig, get_peft_model

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy, train
from lara_adapter import attach_lara, load_lara


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load to act."""
    args = arguments(__doc__, argv)
    folder = args.output / "lora"
    base = new_policy()
    weights = base.state_dict()
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=["to_q", "to_kv", "to_out"]))
    lara = attach_lara(policy, new_lam(), layer=-3)  # New: after get_peft_model
    train(policy, args.steps)
    lara.save_pretrained(folder)  # New: projector, LAM, and policy_lora/ in peft's own format
    print(sorted(path.name for path in folder.iterdir()))
    fresh = new_policy()
    fresh.load_state_dict(weights)
    acting = load_lara(fresh, folder, inference=True, merge=True)  # New: LoRA added to the weights, no peft left
    print(type(acting).__name__, "acts:", tuple(acting.get_action(make_batch(2)).shape))


if __name__ == "__main__":
    main()
