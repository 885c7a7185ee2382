"""The parts of a pre-training run before its first step: processes, model, optimiser."""

from __future__ import annotations

import datetime
from typing import Any

import torch
from torch import nn

from ...data import PairBatch
from ...errors import LaraArgumentError
from ..model import LatentActionModel
from .labelled import LabelledPairs, SupervisedLam
from .settings import PretrainSettings

__all__ = ["make_accelerator", "make_model", "make_optimizer", "make_trained", "move", "progress_bar"]

# one process may still scan videos when the others are through; the defaults end the run after some minutes
_PATIENCE = datetime.timedelta(days=1)


def make_accelerator(settings: PretrainSettings) -> Any:
    """accelerate's Accelerator, with the tracker that the settings name.

    Raises:
        LaraArgumentError: a package is missing, or processes share the model in another way than DDP.
    """
    try:
        import tqdm  # noqa: F401
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs
    except ImportError as error:
        raise LaraArgumentError(
            f"train-lam needs accelerate and tqdm ({error}): pip install 'lara-adapter[train]'"
        ) from error
    tracker = None if settings.tracker == "none" else settings.tracker
    try:
        accelerator = Accelerator(
            log_with=tracker, project_dir=settings.output, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]
        )
    except (ImportError, ValueError) as error:
        raise LaraArgumentError(f"accelerate refuses tracker={tracker!r}: {error}") from error
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise LaraArgumentError(f"train-lam runs on one process or under DDP, not under {kind}: a LAM is small enough")
    if tracker is not None:
        if not accelerator.log_with:
            raise LaraArgumentError(f"tracker={tracker!r} is not installed: pip install {tracker}")
        plain = {name: value if isinstance(value, int | float | str) else str(value)
                 for name, value in settings.to_dict().items()}  # fmt: skip
        try:
            accelerator.init_trackers("lara-lam", config=plain)
        except ImportError as error:  # there, and broken: accelerate looks for the package without importing it
            raise LaraArgumentError(
                f"tracker={tracker!r} cannot be imported: {error}; pip install {tracker}"
            ) from error
    return accelerator


def make_model(settings: PretrainSettings, backbone: nn.Module | None) -> LatentActionModel:
    """The LAM in training mode, the same in every process; the caller's random numbers do not notice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.init is not None:
            model = LatentActionModel.from_pretrained(settings.init, backbone=backbone)
        else:
            model = LatentActionModel(settings.model_config(), backbone=backbone)
    if model.perceptual is not None:
        model.perceptual.load()
    model.checkpoint_layers(settings.checkpointing)
    return model.train()


def make_trained(model: LatentActionModel, labelled: LabelledPairs | None, seed: int) -> nn.Module:
    """What is optimised: the LAM, and with labelled pairs what reads their actions off it."""
    if labelled is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SupervisedLam(model, labelled.width)


def make_optimizer(model: nn.Module, settings: PretrainSettings, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, and not on the codes. Fused where every torch from 2.4 on can be."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in model.named_parameters():
        groups[parameter.ndim < 2 or name.removeprefix("lam.").startswith("quantizer.")].append(parameter)
    assert settings.lr is not None
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": settings.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=settings.lr,
        fused=device.type in ("cpu", "cuda"),
    )


def progress_bar(main: bool, *arguments: Any, **options: Any) -> Any:
    """A tqdm bar of the main process, where somebody watches."""
    from tqdm import tqdm

    return tqdm(*arguments, disable=None if main else True, dynamic_ncols=True, **options)


def move(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch on a device."""
    if device.type == "cpu":
        return batch
    moved = {
        name: getattr(batch, name).pin_memory().to(device, non_blocking=True)
        for name in ("frames", "present", "future")
    }
    return batch._replace(**moved)
