"""LARA inside transformers' Trainer: the frames kept, metrics in its log, the adapter's folder in each checkpoint.

Tested with transformers 4.51 and 5.x.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from lara_adapter import AttachOrderError, LaraAdapter
from lara_adapter.frames import frame_keys
from lara_adapter.saving.read import restore_adapter

from .checkpoints import FOLDER, require_adapter, warn_of_other_frames, warn_of_other_settings, write_frames
from .frames import feature_reader

__all__ = ["LaraCallback", "LaraTrainerMixin"]

logger = logging.getLogger(__name__)


class LaraCallback(TrainerCallback):
    """Logs `lara/*` with the loss and saves the adapter beside each checkpoint.

    Use `LaraCallback.add_to(trainer, lara)`: it must come before the callbacks that write logs, and a callback given to
    Trainer(callbacks=[...]) comes after them.
    """

    def __init__(self, lara: LaraAdapter, frames: Mapping[str, Any] | None = None) -> None:
        self.lara, self.frames = lara, frames

    @classmethod
    def add_to(cls, trainer: Trainer, lara: LaraAdapter, frames: Mapping[str, Any] | None = None) -> LaraCallback:
        """Add a callback to a trainer that is not yet training, before all others; the trainer then keeps the frames.

        With `remove_unused_columns` (the default) a Trainer drops what the policy's forward does not name, also frames.
        Where the LAM keeps its image encoder's features on disk, the data loader's workers read them.

        Args:
            trainer: the trainer.
            lara: attached to its model.
            frames: which frames the batches hold (views, gap, frame_size: anything that JSON can), saved with each
                checkpoint: a run that is resumed with others warns. None: not known.

        Raises:
            AttachOrderError: LARA is attached to another model than the trainer's. Resuming from a checkpoint that was
                written without LARA raises it too.
        """
        host: Any = trainer
        if lara not in set(host.model.modules()):
            raise AttachOrderError("LaraCallback: lara is not in trainer.model; attach_lara first, then Trainer(...)")
        if host.args.remove_unused_columns and lara.config.frames is not None:
            host._set_signature_columns_if_needed()
            host._signature_columns += frame_keys(lara.config.frames)
        if host.args.dataloader_num_workers > 0:
            precision = "bf16" if host.args.bf16 else "fp16" if host.args.fp16 else "no"
            host.data_collator = feature_reader(lara, precision, host.data_collator) or host.data_collator
        callback = cls(lara, frames)
        trainer.callback_handler.callbacks.insert(0, callback)
        load = host._load_from_checkpoint

        def load_with_lara(resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
            result = load(resume_from_checkpoint, *args, **kwargs)
            callback._restore(Path(resume_from_checkpoint))
            return result

        host._load_from_checkpoint = load_with_lara
        return callback

    def _restore(self, checkpoint: Path) -> None:
        """Check the checkpoint of a resumed run, and load what the Trainer does not.

        Of a PeftModel it saves and restores only the LoRA weights. DeepSpeed restores all that trains, and never calls
        this.
        """
        folder = require_adapter(checkpoint, "Start a new run from its weights instead of resuming")
        warn_of_other_settings(self.lara, folder)
        if self.frames is not None:
            warn_of_other_frames(self.frames, folder)
        if self.lara.binding.peft is not None:
            restore_adapter(self.lara, folder)
            logger.info("LARA restored from %s", folder)

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
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
        self.lara.save_pretrained(folder)
        if self.frames is not None and state.is_world_process_zero:
            write_frames(folder, self.frames)


class LaraTrainerMixin:
    """Mixed into a transformers Trainer whose model has LARA: a learning rate of its own for the LAM.

    Attributes:
        lam_lr: peak learning rate of the LAM, scheduled like the policy's; None: the policy's.
    """

    lam_lr: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; the LAM's parameters are in groups of their own, last, if they have their own rate."""
        trainer: Any = self
        fresh = trainer.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.lam_lr is not None and fresh:
            lam = {id(p) for m in trainer.model.modules() if isinstance(m, LaraAdapter) for p in m.lam.parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in lam]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in lam]
                    options = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
                    optimizer.add_param_group({**options, "params": own, "lr": self.lam_lr})
        return optimizer
