"""Checkpoints of pre-training: everything that the next step depends on, in safetensors and JSON, whole or not at all.

    OUTPUT/checkpoints/step-00001000/model.safetensors       the LAM as it trains, and what reads actions off it
                                     optimizer.safetensors   AdamW's moments
                                     ema.safetensors         the running mean of the weights, if there is one
                                     random-0.safetensors    generators, one file for each process
                                     state.json              step, processes and settings

The position in the data and the learning rate are functions of the step and are not stored.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterFormatError, LaraArgumentError
from ...storage.files import load_into, read_json, read_tensors, replace_folder, write_json, write_tensors
from .settings import upgrade_settings

__all__ = ["MeanWeights", "list_checkpoints", "load_checkpoint", "read_state", "save_checkpoint"]

logger = logging.getLogger(__name__)

_SCHEMA = 1
# a change of these would make another run of it; of the others the run may be changed on the way
_FIXED = (
    "preset", "config", "init", "gap", "cameras", "held_out", "seed", "batch_size", "accumulate",
    "steps", "lr", "warmup", "weight_decay", "clip", "ema", "chain", "shuffle_frames", "cut_threshold",
    "still_threshold", "still_keep", "bf16", "reconstruct", "decoder", "index", "episodes", "skip",
    "actions", "action_weight", "augment",
)  # fmt: skip


class MeanWeights:
    """Exponential moving average of a model's parameters and buffers, in float32.

    The codes are `weight + offset`: both are averaged, so that their sum is; codes that were just set from data jump along.

    Args:
        model: what is averaged.
        decay: per step, in (0, 1); less in the first steps, (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self._model = decay, model
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._offset = self.tensors["quantizer.offset"].clone() if "quantizer.offset" in self.tensors else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step` (from 1)."""
        now = self._model.state_dict()
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for name, tensor in now.items():
            if tensor.is_floating_point():
                mine.append(self.tensors[name])
                theirs.append(tensor.detach())
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_(mine, theirs, rate)
        if self._offset is not None:
            offset = now["quantizer.offset"]
            self.tensors["quantizer.offset"].copy_(
                torch.where(offset != self._offset, offset, self.tensors["quantizer.offset"])
            )
            self._offset.copy_(offset)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model has the mean weights; afterwards its own, to the bit."""
        own = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        self._model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._model.load_state_dict(own)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :func:`save_checkpoint` wrote; the model is loaded already."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        if self._offset is not None:
            self._offset.copy_(self._model.state_dict()["quantizer.offset"])


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def save_checkpoint(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: MeanWeights | None,
    settings: dict[str, Any],
    *,
    keep: int,
    random: list[Tensor],
    device: str = "cpu",
) -> None:
    """Write a checkpoint and remove the oldest beyond `keep`. One process calls this.

    Args:
        output: folder of the run.
        step: how many are done.
        model: not wrapped.
        optimizer: AdamW over its parameters.
        mean: the running mean, if any.
        settings: plain data, for the comparison on resuming.
        keep: how many checkpoints to keep.
        random: state of the generators of every process.
        device: where it runs, for the record.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{kind}/{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }
    target = output / "checkpoints" / f"step-{step:08d}"
    with replace_folder(target, keep_others=False) as fresh:
        write_tensors(fresh / "model.safetensors", model.state_dict())
        write_tensors(fresh / "optimizer.safetensors", moments)
        if mean is not None:
            write_tensors(fresh / "ema.safetensors", mean.tensors)
        for rank, state in enumerate(random):
            write_tensors(fresh / f"random-{rank}.safetensors", {"torch": state})
        about = {"schema_version": _SCHEMA, "step": step, "processes": len(random), "device": device}
        write_json(fresh / "state.json", {**about, "settings": settings})
    for old in list_checkpoints(output)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run; quick, to be called before anything long begins.

    Raises:
        LaraArgumentError: of `settings`, those that make a run what it is are not those that it was written with.
        AdapterFormatError: the file is missing, damaged or of another version.
    """
    state = read_json(folder / "state.json")
    if state.get("schema_version") != _SCHEMA or not isinstance(state.get("step"), int):
        raise AdapterFormatError(
            f"{folder / 'state.json'} is not a checkpoint of this version; remove the folder to begin anew"
        )
    before = upgrade_settings(state["settings"])
    changed = [f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in _FIXED
               if name in settings and before.get(name) != settings[name]]  # fmt: skip
    if changed:
        raise LaraArgumentError(
            f"{folder} was written with other settings: {'; '.join(changed)}. Give the same, or another output folder "
            "(with --init to start from these weights)"
        )
    return state


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mean: MeanWeights | None,
    settings: dict[str, Any],
    *,
    rank: int,
    ranks: int,
) -> tuple[int, Tensor | None]:
    """Continue from a checkpoint, as in :func:`save_checkpoint`: process number `rank` of `ranks` calls this.

    Returns:
        How many steps are done, and the state of this process's generator, if there is one.

    Raises:
        LaraArgumentError: the settings are not those that it was written with.
        AdapterFormatError: a file is missing or damaged.
    """
    state = read_state(folder, settings)
    if state["processes"] != ranks:
        logger.warning(
            "%d processes before, %d now: the pairs come in another order from here", state["processes"], ranks
        )
    load_into(model, read_tensors(folder / "model.safetensors"), folder)
    parameters = dict(model.named_parameters())
    for name, value in read_tensors(folder / "optimizer.safetensors").items():
        kind, _, owner = name.partition("/")
        if owner not in parameters:
            raise AdapterFormatError(f"{folder / 'optimizer.safetensors'}: {owner} is not a parameter of this model")
        # AdamW keeps its count of steps on the CPU unless it is fused or capturable
        on_cpu = kind == "step" and not optimizer.defaults["fused"]
        device = "cpu" if on_cpu else parameters[owner].device
        optimizer.state[parameters[owner]][kind] = value.to(device)
    if mean is not None:
        mean.load(read_tensors(folder / "ema.safetensors"))
    own = folder / f"random-{rank}.safetensors"
    return int(state["step"]), read_tensors(own)["torch"] if own.is_file() else None
