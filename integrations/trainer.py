"""LARA inside transformers' Trainer: metrics in its log, the adapter's folder in each checkpoint.

Tested with transformers 4.51 and 5.x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lara_adapter import AttachOrderError, LaraAdapter

__all__ = ["LaraCallback"]

FOLDER = "lara"  # inside checkpoint-<step>


class LaraCallback(TrainerCallback):
    """Logs `lara/*` with the loss and saves the adapter beside each checkpoint.

    Use `LaraCallback.add_to(trainer, lara)`: it must come before the callbacks that write logs, and a callback given to
    Trainer(callbacks=[...]) comes after them.

    Attributes:
        lara: the attached adapter.
    """

    def __init__(self, lara: LaraAdapter) -> None:
        self.lara = lara

    @classmethod
    def add_to(cls, trainer: Trainer, lara: LaraAdapter) -> LaraCallback:
        """Add a callback to a trainer, before all others.

        Args:
            trainer: not yet training.
            lara: attached to the trainer's model.

        Raises:
            AttachOrderError: LARA is attached to another model, or after the optimizer was made.
        """
        modules = set(trainer.model.modules())
        if lara not in modules:
            raise AttachOrderError(
                "LaraCallback: lara is not part of trainer.model; attach_lara first, then Trainer(...)"
            )
        callback = cls(lara)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before a resumed run goes on: the checkpoint must have been written with LARA.

        Raises:
            AttachOrderError: it was written without.
        """
        if state.global_step == 0:
            return
        last = get_last_checkpoint(args.output_dir)
        folder = Path(last or args.output_dir)
        if folder.is_dir() and not (folder / FOLDER / "lara_config.json").is_file():
            raise AttachOrderError(
                f"{folder} was saved by a run without LARA (it has no {FOLDER}/), so its optimizer state does not fit. "
                "Start a new run from its weights instead of resuming"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Put `lara/*` beside the training loss, in what is printed, tracked and kept in the history."""
        if logs is None or "loss" not in logs:
            return
        values = {f"lara/{name}": value for name, value in self.lara.metrics().items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the adapter; every rank takes part (a sharded adapter is gathered by all), rank 0 writes."""
        self.lara.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)
