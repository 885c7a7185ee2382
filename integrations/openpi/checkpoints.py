"""Checkpoints that are stock openpi's, with LARA beside them.

<step>/model.safetensors   without LARA: PI0Pytorch loads it strictly, so do openpi's server and training
<step>/lara/               the adapter, and frames.json: which frames it had
<step>/optimizer.pt        LARA's moments among the policy's
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open

from lara_adapter import LaraAdapter
from lara_adapter.binding import ADAPTER_NAME
from lara_adapter.saving.read import restore_adapter

from ..checkpoints import (
    FOLDER,
    require_adapter,
    warn_of_other_frames,
    warn_of_other_settings,
    without_lara,
    write_frames,
)
from .frames import FramePlan

__all__ = ["CheckpointFiles", "adapter_to_resume", "latest_checkpoint", "load_policy", "save_policy"]


def save_policy(lara: LaraAdapter, filename: str | Path) -> None:
    """Write `model.safetensors` of the policy without LARA; a plain PI0Pytorch loads it strictly."""
    with without_lara(lara.policy):
        safetensors.torch.save_model(lara.policy, str(filename))


def load_policy(lara: LaraAdapter, filename: str | Path, **kwargs: Any) -> Any:
    """`safetensors.torch.load_model`, strictly, for a policy that has LARA; the file may hold LARA's weights or not."""
    with safe_open(str(filename), framework="pt") as file:
        inside = any(name.startswith(f"{ADAPTER_NAME}.") for name in file.keys())  # noqa: SIM118
    with contextlib.nullcontext() if inside else without_lara(lara.policy):
        return safetensors.torch.load_model(lara.policy, str(filename), **kwargs)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest `<step>` folder of a run, as openpi chooses it; None if there is none."""
    steps = [int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit()]
    return folder / str(max(steps)) if steps else None


def adapter_to_resume(checkpoint: Path) -> Path:
    """:func:`require_adapter` for a `<step>` folder."""
    fix = f"Start a new run from its weights: another --exp-name, --pytorch-weight-path {checkpoint}, without --resume"
    return require_adapter(checkpoint, fix)


class CheckpointFiles:
    """Replaces the module `safetensors` in openpi's training script, which calls two of its functions.

    openpi saves into a temporary folder and renames it: `lara/` written here is part of the same rename.

    Attributes:
        run_folder: a file below it is a checkpoint that the run resumes from, any other is base weights.
        lara: set when LARA has been attached.
        plan: set when it is known which frames LARA gets.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder.resolve()
        self.lara: LaraAdapter | None = None
        self.plan: FramePlan | None = None

    @property
    def torch(self) -> CheckpointFiles:
        """As `safetensors.torch`."""
        return self

    def save_model(self, model: Any, filename: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `safetensors.torch.save_model`, without LARA, which goes into the folder beside it."""
        if self.lara is None or model is not self.lara.policy:
            safetensors.torch.save_model(model, str(filename), *args, **kwargs)
            return
        save_policy(self.lara, filename)
        self.lara.save_pretrained(Path(filename).parent / FOLDER)
        if self.plan is not None:
            write_frames(Path(filename).parent / FOLDER, dataclasses.asdict(self.plan))

    def load_model(self, model: Any, filename: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As `safetensors.torch.load_model`; of a checkpoint of this run LARA's part too.

        Raises:
            AttachOrderError: the checkpoint was saved by a run without LARA.
        """
        if self.lara is None or model is not self.lara.policy:
            return safetensors.torch.load_model(model, str(filename), *args, **kwargs)
        result = load_policy(self.lara, filename, *args, **kwargs)
        folder = Path(filename).resolve().parent
        if self.run_folder in folder.parents:
            adapter = adapter_to_resume(folder)
            warn_of_other_settings(self.lara, adapter)
            if self.plan is not None:
                warn_of_other_frames(dataclasses.asdict(self.plan), adapter)
            restore_adapter(self.lara, adapter)
        return result
