"""LARA in a LightningModule, which trains by `training_step`.

pip install lightning && python -m examples.by_feature.lightning_module
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning
import torch
from torch import Tensor

from examples.by_feature.world import arguments, make_batch, new_lam, new_policy
from lara_adapter import attach_lara


class Module(lightning.LightningModule):
    """An ordinary LightningModule around a policy."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = new_policy()

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The policy's loss."""
        return self.policy(batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Made by the trainer after attach_lara: it holds LARA's parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = arguments(__doc__, argv)
    module = Module()
    lara = attach_lara(module, new_lam(), layer=-3, entry="training_step")  # New: the method that Lightning calls
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=args.output,
    )  # fmt: skip
    batches = [make_batch(seed=seed) for seed in range(args.steps)]
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    print(f"{lara.step} training steps with LARA; cosine {lara.metrics()['cosine']:.3f}")


if __name__ == "__main__":
    main()
