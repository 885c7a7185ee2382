"""What the checkpoints of all hosts have in common: the host's own weights without LARA, and the adapter beside them."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lara_adapter import AttachOrderError, LaraAdapter
from lara_adapter.saving.layout import CONFIG_FILE
from lara_adapter.storage.files import read_json, write_json

__all__ = [
    "FOLDER", "find_adapter", "require_adapter", "warn_of_other_frames", "warn_of_other_settings", "without_lara",
    "write_frames",
]  # fmt: skip

logger = logging.getLogger(__name__)

FOLDER = "lara"  # the adapter's, inside a host's checkpoint
_FRAMES_FILE = "frames.json"  # in it
_SETTINGS = (
    "token", "projector", "alignment", "align_weight", "lam_weight", "lam_grad_scale", "reconstruct", "train_lam",
)  # fmt: skip


def find_adapter(checkpoint: Path) -> Path | None:
    """The adapter's folder in a checkpoint, or None if the checkpoint was saved without LARA."""
    folder = checkpoint / FOLDER
    return folder if (folder / CONFIG_FILE).is_file() else None


def require_adapter(checkpoint: Path, fix: str) -> Path:
    """The adapter's folder in a checkpoint to resume; raises AttachOrderError, ending in `fix`, if there is none."""
    folder = find_adapter(checkpoint)
    if folder is None:
        raise AttachOrderError(
            f"{checkpoint} was saved by a run without LARA (it has no {FOLDER}/), so its optimizer state does not fit. "
            f"{fix}"
        )
    return folder


def warn_of_other_settings(lara: LaraAdapter, folder: Path) -> None:
    """Warn if a run that is resumed is not set as the one that it was saved with: settings come from its command."""
    saved, now = read_json(folder / CONFIG_FILE), json.loads(json.dumps(lara.config.to_dict()))
    if saved.get("tap") != now["tap"]:
        logger.warning(
            "%s was saved with the state at %s, but here it is read at %s", folder, saved.get("tap"), now["tap"]
        )
    others = [f"{name}={saved[name]} ({now[name]})" for name in _SETTINGS if name in saved and saved[name] != now[name]]
    if others:
        logger.warning(
            "%s was saved with other settings than those of this run, in brackets: %s. A resumed run takes them from its "
            "command: repeat the flags of the first run", folder, ", ".join(others),
        )  # fmt: skip


def write_frames(folder: Path, frames: Mapping[str, Any]) -> None:
    """Write beside the adapter which frames it had (views, gap, frame_size), for :func:`warn_of_other_frames`."""
    write_json(folder / _FRAMES_FILE, dict(frames))


def warn_of_other_frames(frames: Mapping[str, Any], folder: Path) -> None:
    """Warn if a run that is resumed does not show the LAM the frames that it was saved with."""
    if not (folder / _FRAMES_FILE).is_file():  # of an older run
        return
    saved, now = read_json(folder / _FRAMES_FILE), json.loads(json.dumps(dict(frames)))
    if others := [f"{name}={saved.get(name)} ({now[name]})" for name in now if saved.get(name) != now[name]]:
        logger.warning(
            "%s was saved with other frames than those of this run, in brackets: %s. Repeat the flags of the first run",
            folder, ", ".join(others),
        )  # fmt: skip


@contextlib.contextmanager
def without_lara(policy: nn.Module) -> Iterator[None]:
    """Within this context the adapter is not in the policy's module tree, and so in no state_dict of it."""
    owners = []
    for module in policy.modules():
        if any(isinstance(child, LaraAdapter) for child in module._modules.values()):
            owners.append((module, dict(module._modules)))
    try:
        for owner, children in owners:
            for name, child in children.items():
                if isinstance(child, LaraAdapter):
                    del owner._modules[name]
        yield
    finally:
        for owner, children in owners:
            owner._modules.clear()
            owner._modules.update(children)  # in their old order: the optimizer's state is stored by position
