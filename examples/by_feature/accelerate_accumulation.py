"""LARA with accelerate and gradient accumulation.

pip install -e ".[train]" && accelerate launch -m examples.by_feature.accelerate_accumulation
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from examples.by_feature.world import arguments, make_rows, new_lam, new_policy
from lara_adapter import attach_lara


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = arguments(__doc__, argv)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    policy = new_policy()
    lara = attach_lara(policy, new_lam(), layer=-3, alignment="contrastive")  # New: before optimizer and prepare
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(make_rows(8 * args.steps), batch_size=4, shuffle=True)
    policy, optimizer, loader = accelerator.prepare(policy, optimizer, loader)
    policy.train()
    for batch in loader:
        with accelerator.accumulate(policy):
            loss = policy(batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    # New: LARA's step, and its schedules, count forwards: two to an update here. Negatives come from one forward
    accelerator.print(f"{lara.step} forwards, {lara.step // 2} updates; alignment {lara.metrics()['align_loss']:.3f}")
    if accelerator.is_main_process:
        lara.save_pretrained(args.output / "accelerate")


if __name__ == "__main__":
    main()
