"""`lerobot-train` with LARA: every stock flag, and `--lara.*`.

    python -m lara_adapter.integrations.lerobot.train --lara.lam=FOLDER <flags of lerobot-train>
    accelerate launch -m lara_adapter.integrations.lerobot.train ...

It runs LeRobot's own `main` with three functions of `lerobot.scripts.lerobot_train` wrapped: `make_train_eval_datasets`
(the training set becomes a LaraDataset), `make_optimizer_and_scheduler` (attach_lara before it) and `save_checkpoint`
(`pretrained_model/lara/` before it). The policy keeps its stock type, and its checkpoints a stock configuration and
model.safetensors.

Why a launcher, and neither `--policy.discover_packages_path` nor a `lerobot_policy_*` distribution (LeRobot 0.6.1):

- A policy type of our own would be written into the checkpoint's config.json, so that every user of the policy needs
  lara_adapter; `--policy.path=BASE` would train without LARA; and `wrap_with_peft` would freeze the projector and LAM.
- A discovered package must be named again on every resume, and is imported after LeRobot has copied the command line, too
  late to take `--lara.*` out of it.
- A `lerobot_policy_*` distribution is imported by every LeRobot command on the machine, to patch one of them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lara_adapter import LaraAdapter, attach_lara, load_lara
from lara_adapter.check import check_optimizer
from lara_adapter.errors import LaraArgumentError, LaraError, OptimizerCoverageError

from ..checkpoints import require_adapter
from ..frames import feature_reader
from ..hosts import replaced
from ..settings import describe_error, prepare_lam
from .checkpoints import DataSettings, save_beside, stock_saves
from .dataset import FRAMES, LaraDataset
from .options import LaraOptions, LeRobotSettings, make_parser, parse_options

__all__ = ["main"]

logger = logging.getLogger(__name__)

# in some of these the wrong blocks would be found by structure
_NO_DIT = {
    "act": "regresses its chunk in one pass and denoises nothing",
    "diffusion": "denoises with a convolutional UNet; multi_task_dit is LeRobot's diffusion transformer",
    "pi0_fast": "generates discrete action tokens",
    "vqbet": "predicts discrete action codes",
    "tdmpc": "is not a diffusion policy",
    "gaussian_actor": "is not a diffusion policy",
}
_SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train.

    Args:
        argv: command line without the program's name; None: this process's.

    Raises:
        LaraError: LARA cannot be attached, or the checkpoint that is resumed was saved without it.
        SystemExit: a flag cannot be read, or after --help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options, theirs = parse_options(argv)
    if "--help" in theirs or "-h" in theirs:
        make_parser().print_help()
    from lerobot.scripts import lerobot_train

    run = _Run(options, lerobot_train)
    # LeRobot reads sys.argv again and again
    with replaced(lerobot_train, **run.replacements()), replaced(sys, argv=[sys.argv[0], *theirs]):
        lerobot_train.main()


class _Run:
    """One training run: what replaces LeRobot's functions, and what they hand to each other."""

    def __init__(self, options: LaraOptions, host: Any) -> None:
        self.options = options
        missing = sorted(name for name in self.replacements() if not hasattr(host, name))
        if missing:
            raise LaraArgumentError(
                f"this LeRobot has no {missing} in lerobot.scripts.lerobot_train; tested with lerobot 0.6.1"
            )
        self.host: dict[str, Callable[..., Any]] = {name: getattr(host, name) for name in self.replacements()}
        self.source: Path | str | None = None  # a saved adapter to go on from
        self.data: DataSettings  # set by make_train_eval_datasets
        self.train: LaraDataset  # likewise
        self.lara: LaraAdapter  # set by make_optimizer_and_scheduler

    def replacements(self) -> dict[str, Callable[..., Any]]:
        functions = (
            self.make_train_eval_datasets, self.make_optimizer_and_scheduler, self.save_checkpoint, self.submit_to_hf,
        )  # fmt: skip
        return {function.__name__: function for function in functions}

    def make_train_eval_datasets(self, cfg: Any) -> tuple[LaraDataset, Any]:
        """The evaluation set stays as it is: LARA does nothing in eval mode and needs no frames."""
        self._check(cfg)
        train, evaluation = self.host["make_train_eval_datasets"](cfg)
        saved = DataSettings.read(Path(self.source)) if cfg.resume and self.source else None
        gap = self.options.get("gap", saved.gap if saved else None)
        train = LaraDataset(
            train,
            gap=_chunk_length(cfg.policy) if gap is None else gap,
            views=self.options.get("views", list(saved.views) if saved else None),
            frame_size=self.options.get("frame_size", saved.frame_size if saved else None),
        )
        self.data, self.train = DataSettings(train.views, train.gap, train.frame_size), train
        return train, evaluation

    def make_optimizer_and_scheduler(self, cfg: Any, policy: nn.Module) -> Any:
        """Attach: the policy has its weights and its LoRA by now, and no optimizer, DDP or accelerate yet."""
        from accelerate.state import AcceleratorState, is_initialized

        arguments = {"frames": FRAMES, **self.options.attach_arguments}
        if self.source is not None:
            self.lara = load_lara(policy, self.source, revision=self.options.get("revision"), **arguments)
        else:
            self.lara = attach_lara(policy, self.options.get("lam"), **arguments)
        prepare_lam(self.lara, self.options.get("feature_cache"), self.options.get("lam_checkpointing", False))
        self.train.reader = feature_reader(self.lara, AcceleratorState().mixed_precision if is_initialized() else "no")
        stock_saves(self.lara)
        optimizer, scheduler = self.host["make_optimizer_and_scheduler"](cfg, policy)
        try:
            check_optimizer(self.lara, optimizer)
        except OptimizerCoverageError as error:
            raise OptimizerCoverageError(
                f"{type(self.lara.policy).__name__}.get_optim_params() leaves LARA out; register a PolicySpec whose owner= "
                f"is a submodule that it returns, or --use_policy_training_preset=false with an optimizer: {error}"
            ) from error
        logger.info("LARA on %s: %s; %s", type(self.lara.policy).__name__, self.lara.extra_repr(), self.data)
        return optimizer, scheduler

    def save_checkpoint(self, checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        """First LARA's part, so that a checkpoint with a training state is never without it."""
        save_beside(self.lara, Path(checkpoint_dir) / "pretrained_model", self.data)
        self.host["save_checkpoint"](checkpoint_dir, *args, **kwargs)

    def submit_to_hf(self, cfg: Any) -> None:
        """A remote job would run plain lerobot-train."""
        raise LaraArgumentError("--job.target runs lerobot-train, without LARA; run this command on the remote machine")

    def _check(self, cfg: Any) -> None:
        """Refuse what cannot work before anything is loaded."""
        if cfg.is_reward_model_training or cfg.policy is None:
            raise LaraArgumentError("LARA trains policies, but this run trains a reward model; use lerobot-train")
        if cfg.policy.type in _NO_DIT:
            raise LaraArgumentError(
                f"--policy.type={cfg.policy.type} {_NO_DIT[cfg.policy.type]}: there is no diffusion transformer to align"
            )
        sharded = [name for variable, name in _SHARDED.items() if os.environ.get(variable, "").lower() in ("true", "1")]
        if getattr(getattr(cfg, "parallelism", None), "is_sharded", False):  # LeRobot 0.6.2's own flags
            sharded.append("--parallelism.dp_shard")
        if sharded:
            raise LaraArgumentError(f"this launcher is not tested under {sharded[0]}; use DDP (accelerate's default)")
        if not cfg.resume:
            self.options.check_new_run()
            self.source = self.options.get("path")
            return
        self.options.check_resume()
        pretrained = Path(cfg.policy.pretrained_path)
        weights = f"--policy.path={pretrained} --lara.lam=FOLDER, without --resume"
        fix = f"Start a new run from its weights: {weights}; or resume it with lerobot-train"
        self.source = require_adapter(pretrained, fix)


def _chunk_length(policy: Any) -> int:
    """C of the paper: the steps from now to the end of the action chunk."""
    steps = policy.action_delta_indices
    if not steps:
        raise LaraArgumentError(f"--policy.type={policy.type} has no action chunk; give --lara.gap= in frames")
    return int(max(steps)) + 1


if __name__ == "__main__":
    try:
        main()
    except LaraError as problem:  # what the user can fix: no traceback
        sys.exit(describe_error(problem, LeRobotSettings, hyphens=False))
