"""openpi's own training loop (scripts/train_pytorch.py) with LARA.

The loop is a script of openpi's repository, in no wheel, so it is run from the checkout that openpi is installed from, or
from one that you name. It offers no hook. Replaced while it runs: `build_datasets` and `safetensors` among the script's
globals, the model's constructor in openpi, and, if the LAM has its own learning rate, `torch.optim.AdamW`. The model keeps
its stock class, and openpi's check of its patched transformers still runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lara_adapter import LaraAdapter, LaraArgumentError
from lara_adapter.attach import locate
from lara_adapter.check import check_optimizer
from lara_adapter.policies import PolicySpec, find_spec
from lara_adapter.saving.layout import LAM_FOLDER

from ..hosts import import_host, replaced
from ..old_names import accept_old_names
from ..settings import LaraSettings
from .checkpoints import CheckpointFiles, adapter_to_resume, latest_checkpoint
from .frames import FramePlan, observation_frames
from .loader import create_data_loader
from .script import load_training_script

__all__ = ["OpenpiLaraSettings", "attach", "lara_training", "run"]

logger = logging.getLogger(__name__)

_LAM_GROUP = "lara_lam"


@accept_old_names("horizon")
@dataclass
class OpenpiLaraSettings(LaraSettings):
    """LaraSettings with the paper's choice for pi0.5, and the official release's tap.

    Attributes:
        layer: aligned hidden state of the action expert: -1 after its last layer (the paper's best for pi0.5), -3 after
            L-2.
        after_norm: with layer -1: align the state after the final norm, as the official release, not the one before.
    """

    layer: int = -1
    after_norm: bool = False


def attach(policy: Any, lam: Any, settings: OpenpiLaraSettings | None = None) -> LaraAdapter:
    """`attach_lara` on a PI0Pytorch, with frames from a LaraObservation.

    Args:
        policy: PI0Pytorch, pi0 or pi0.5.
        lam: a latent action model.
        settings: None: the defaults. Its `lam` is not read.

    Raises:
        LaraArgumentError: `after_norm` with another layer than the last, or another policy.
        LaraError: see :func:`lara_adapter.attach_lara`.
    """
    settings = settings or OpenpiLaraSettings()
    spec = _spec(policy, settings.after_norm)
    if settings.after_norm:
        _, _, tap = locate(policy, settings.layer, None, spec)
        if tap.layer != tap.depth:
            raise LaraArgumentError(
                f"after_norm=True is for the last layer, got layer={settings.layer} (--lara.layer -1)"
            )
    return settings.attach(policy, lam, frames=observation_frames, spec=spec)


def _spec(policy: Any, after_norm: bool) -> PolicySpec:
    """The policy's row of the table, with its last tap before or after the final norm.

    After it, the state is read at the input of the model's last projection: the action tokens alone, in float32.
    """
    spec = find_spec(policy)
    if spec.tap != "norm" or not hasattr(policy, "action_out_proj"):
        raise LaraArgumentError(
            f"attach: policy is a {type(policy).__name__}, but openpi's PI0Pytorch is expected; attach_lara takes any other"
        )
    norm = f"{str(spec.blocks).rpartition('.')[0]}.norm"
    return replace(spec, final_norm="action_out_proj" if after_norm else norm)


@contextlib.contextmanager
def lara_training(
    config: Any, settings: OpenpiLaraSettings, source: str | Path | None = None
) -> Iterator[tuple[Any, Callable[[], LaraAdapter]]]:
    """Within this context openpi's training script trains with LARA.

    Args:
        config: openpi's TrainConfig.
        settings: LARA's. A run that is resumed needs no `lam`: it goes on with its own.
        source: see :func:`.script.find_training_script`.

    Yields:
        The script as a module, to call its `train_loop(config)`, and a function that returns the adapter.

    Raises:
        HostNotInstalled: no openpi, no script, or not the one this was written for.
        AttachOrderError: the run that is to be resumed was saved without LARA.
        LaraError: see :func:`attach` and :func:`create_data_loader`.
    """
    script = load_training_script(source)
    base = config.pytorch_weight_path
    if base is not None and not config.resume and not (Path(base) / "model.safetensors").is_file():
        raise LaraArgumentError(f"--pytorch-weight-path={base}: a folder with openpi's model.safetensors is expected")
    run_folder = Path(config.checkpoint_dir)
    last = latest_checkpoint(run_folder) if run_folder.is_dir() else None
    if config.resume:
        if last is None:
            raise LaraArgumentError(f"{run_folder} holds no checkpoint to resume; leave out --resume")
        settings = replace(settings, lam=settings.lam or str(adapter_to_resume(last) / LAM_FOLDER))
    elif last is not None and not getattr(config, "overwrite", False):
        raise LaraArgumentError(
            f"{run_folder} holds checkpoints of an earlier run: --resume goes on with it, --overwrite deletes it"
        )
    training = _Training(config, settings, script, CheckpointFiles(run_folder))
    with training.in_place():
        yield script, training.adapter


def run(config: Any, settings: OpenpiLaraSettings, source: str | Path | None = None) -> LaraAdapter:
    """openpi's `train_loop(config)` with LARA; `config.resume` resumes as in openpi.

    For arguments and errors see :func:`lara_training`.

    Returns:
        The adapter, still attached to the trained model (`.policy`).
    """
    with lara_training(config, settings, source) as (script, adapter):
        script.train_loop(config)
    return adapter()


class _Training:
    """What replaces parts of openpi during one run, and what they hand to each other."""

    def __init__(self, config: Any, settings: OpenpiLaraSettings, script: Any, files: CheckpointFiles) -> None:
        self.config, self.settings, self.script, self.files = config, settings, script, files
        self.models = import_host("openpi.models_pytorch.pi0_pytorch")
        self.lam = settings.build_lam()  # before the minutes that the policy takes to load
        self.stock_model, self.stock_adamw = self.models.PI0Pytorch, torch.optim.AdamW
        self.checked = False

    def adapter(self) -> LaraAdapter:
        if self.files.lara is None:
            raise LaraArgumentError("openpi's train_loop has not built its model yet, so there is no adapter")
        return self.files.lara

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(self.script, build_datasets=self.build_datasets, safetensors=self.files))
            stack.enter_context(replaced(self.models, PI0Pytorch=self.build_model))
            if self.settings.lam_lr is not None:
                stack.enter_context(replaced(torch.optim, AdamW=self.build_optimizer))
            stack.callback(register_optimizer_step_pre_hook(self.before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self.after_step).remove)
            yield

    def build_datasets(self, config: Any) -> tuple[Any, Any]:
        plan = FramePlan(self.settings.views, self.settings.gap, self.settings.frame_size_for(self.lam))
        loader = create_data_loader(config, plan)
        self.files.plan = loader.plan
        return loader, loader.data_config()

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the class PI0Pytorch: attaches before the model is wrapped, loaded and optimised."""
        policy = self.stock_model(*args, **kwargs)
        self.files.lara = attach(policy, self.lam, self.settings)
        return policy

    def build_optimizer(self, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        """The LAM's parameters in a group of their own, last; the loop sets one rate for all, `before_step` this one."""
        lam, everything = {id(p) for p in self.adapter().lam.parameters()}, list(parameters)
        own: dict[str, Any] = {"params": [p for p in everything if id(p) in lam], "name": _LAM_GROUP}
        return self.stock_adamw([{"params": [p for p in everything if id(p) not in lam]}, own], *args, **kwargs)

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.files.lara is None:
            return
        if not self.checked:
            check_optimizer(self.files.lara, optimizer)
            self.checked = True
        for group in optimizer.param_groups:
            if group.get("name") == _LAM_GROUP:  # the loop has just written the policy's rate into it
                group["lr"] *= self.settings.lam_lr / self.config.lr_schedule.peak_lr

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Log when openpi does: the adapter counts the same steps, and its count is saved."""
        lara = self.files.lara
        main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        step = lara.step - 1 if lara is not None else 1
        if lara is None or not main or step % self.config.log_interval:
            return
        values = {f"lara/{name}": value for name, value in lara.metrics().items()}
        if not values:  # both weights 0: LARA is idle and counts no steps
            return
        logger.info("step=%d %s", step, " ".join(f"{name}={value:.4g}" for name, value in values.items()))
        if self.config.wandb_enabled:
            self.script.wandb.log(values, step=step)
