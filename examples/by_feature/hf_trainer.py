"""LARA in transformers' Trainer.

pip install -e ".[lam,train]" && python -m examples.by_feature.hf_trainer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lara_adapter.integrations.trainer import LaraCallback
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from examples.by_feature.world import arguments, make_rows, new_lam, new_policy
from lara_adapter import attach_lara


class Model(nn.Module):
    """A policy with named inputs, as the Trainer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = new_policy()

    def forward(
        self, image: Tensor, state: Tensor, task: Tensor, action: Tensor, action_mask: Tensor
    ) -> Mapping[str, Any]:
        """The policy's loss."""
        inputs = {"image": image, "state": state, "task": task, "action": action, "action_mask": action_mask}
        return self.policy(inputs)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print the last line of the log."""
    args = arguments(__doc__, argv)
    model = Model()
    lara = attach_lara(model, new_lam(), layer=-3)  # New: before Trainer(...)
    settings = TrainingArguments(
        str(args.output / "hf_trainer"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_steps=args.steps, logging_steps=1, save_steps=args.steps, report_to=[], use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=make_rows(32))
    LaraCallback.add_to(trainer, lara)  # New: keeps the frames, logs lara/*, saves the adapter in each checkpoint
    trainer.train()
    shown = next(entry for entry in reversed(trainer.state.log_history) if "lara/cosine" in entry)
    print({name: round(value, 3) for name, value in shown.items() if name in ("loss", "lara/cosine", "lara/lam_loss")})
    print("adapter:", args.output / "hf_trainer" / f"checkpoint-{args.steps}" / "lara")


if __name__ == "__main__":
    main()
