"""The settings of stage 1, LAM pre-training on video; the command line is made from this class."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal

from ...data.gap import Gap, parse_gap
from ...errors import LaraArgumentError
from ...schedules import check_share
from ...storage.files import check_folder, read_json
from ..config import FORMAT, LatentActionConfig

__all__ = ["PretrainSettings", "upgrade_settings"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Settings of :func:`~lara_adapter.lam.pretrain.pretrain_lam`. The paper's: `--preset paper`, 512 pairs a step in all.

    Attributes:
        videos: folders of videos, pictures or LeRobot datasets, or single files.
        output: folder of the result: the LAM, checkpoints, index, health, pictures. What is there is continued.
        preset: paper (ViT-MAE-large, 224 pixels, LPIPS) or tiny (64 pixels, trains from nothing on a CPU).
        config: JSON file with fields of LatentActionConfig to set otherwise than the preset, or a whole config.json.
        init: folder or Hub id of a LAM to train on; then preset and config are not used.
        gap: distance between the two frames of a pair, in frames ("5", the paper's) or seconds ("0.5s", for collections of
            different frame rates).
        cameras: cameras of LeRobot datasets, with or without "observation.images."; none: all.
        episodes: episodes to train on, each a number ("7") or a range without its end ("0:50"), if `videos` is one dataset;
            none: all.
        skip: of these, the episodes to leave out.
        picture_fps: frames per second of pictures; None: what the format states, else 30 for folders and 10 for others.
        cut_threshold: mean change of a pixel between neighbours, [0, 1], from which on it may be a cut; 0: no cuts.
        still_threshold: a pair whose most moving pixels change by less, [0, 1], is still.
        still_keep: share of the still pairs that is trained on, [0, 1].
        held_out: share of episodes that is only measured on, (0, 1).
        actions: dataset of a few demonstrations of the same robot, any format with actions: beside L_LAM their actions have
            to be read off z, so that it holds what the robot did. They are held in memory. None: video alone, the paper's.
        action_weight: of that mean squared error, of standardised actions, > 0.
        augment: the inverse dynamics model sees random squares and light in every frame; the frames that are predicted have
            none of that, so that z holds less of such things.
        steps: optimiser steps; paper: 350000, tiny: 3000.
        batch_size: pairs of a step and process; paper: 64, tiny: 32.
        accumulate: batches that make up one step.
        lr: peak learning rate; paper: 1e-4, tiny: 5e-4.
        warmup: share of the steps in which it rises, [0, 1); then it falls as a cosine to 0.
        weight_decay: of AdamW, on matrices only.
        clip: bound on the norm of the gradient; 0: none.
        ema: decay per step of a running mean of the weights, which is then the result; 0: off. For example 0.999.
        reconstruct: part of the pairs, drawn at each step, that the forward dynamics see, (0, 1]; 1: all, the paper's.
        bf16: autocast to bfloat16.
        checkpointing: compute the activations of the layers again in the backward: less memory, more work.
        chain: pairs at most that follow each other, so that the frozen encoder sees a frame once; paper: 4, tiny: 1.
        shuffle_frames: frames that a process shuffles over; it holds up to twice as many, of 3 size^2 bytes.
        workers: decoding threads of a process.
        index: whole (every frame is looked at before the first step), ahead (in stretches, while it trains), or auto: ahead
            for more than 10000 files or 10 GB, otherwise whole.
        decoder: av, or torchcodec where it is installed, for what is trained on; the index is always made with av.
        seed: of weights, order and held-out episodes.
        log_every: steps between two lines of the log.
        health_every: steps between two measurements on held-out pairs, with pictures.
        health_pairs: held-out pairs to measure on.
        save_every: steps between two checkpoints.
        keep: how many checkpoints to keep.
        tracker: where to send the numbers too; wandb and tensorboard are packages to be installed.
        resume: auto (continue what is in the output folder) or never (refuse if there is something).
    """

    videos: tuple[Path, ...]
    output: Path
    preset: Literal["paper", "tiny"] = "paper"
    config: Path | None = None
    init: str | None = None
    gap: str = "5"
    gap_frames: InitVar[int | None] = None  # old names of `gap`, for this release
    gap_seconds: InitVar[float | None] = None
    cameras: tuple[str, ...] = ()
    episodes: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    picture_fps: float | None = None
    cut_threshold: float = 0.08
    still_threshold: float = 0.02
    still_keep: float = 0.1
    held_out: float = 0.05
    actions: Path | None = None
    action_weight: float = 1.0
    augment: bool = False
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    lr: float | None = None
    warmup: float = 0.003
    weight_decay: float = 1e-5
    clip: float = 1.0
    ema: float = 0.0
    reconstruct: float = 1.0
    bf16: bool = False
    checkpointing: bool = False
    chain: int | None = None
    shuffle_frames: int = 4096
    workers: int = 2
    index: Literal["auto", "whole", "ahead"] = "auto"
    decoder: Literal["av", "torchcodec"] = "av"
    seed: int = 0
    log_every: int = 50
    health_every: int = 500
    health_pairs: int = 256
    save_every: int = 1000
    keep: int = 3
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    resume: Literal["auto", "never"] = "auto"

    def __post_init__(self, gap_frames: int | None, gap_seconds: float | None) -> None:
        gap = self.gap
        if gap_frames is not None or gap_seconds is not None:
            if None not in (gap_frames, gap_seconds):
                raise LaraArgumentError(
                    f"gap_frames={gap_frames} and gap_seconds={gap_seconds}: only one of them can hold"
                )
            gap = str(Gap(gap_frames, gap_seconds))
            logger.warning("gap_frames and gap_seconds are deprecated and go with the next release; use gap=%r", gap)
        object.__setattr__(self, "gap", str(parse_gap(gap)))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise LaraArgumentError(f"{name}={value}, but a number >= {least} is expected")
        for name in ("lr", "picture_fps", "action_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise LaraArgumentError(f"{name}={value}, but a number > 0 is expected")
        for name in ("warmup", "ema", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise LaraArgumentError(f"{name}={getattr(self, name)}, but a number in [0, 1) is expected")
        for name, choices in (("decoder", ("av", "torchcodec")), ("index", ("auto", "whole", "ahead"))):
            if getattr(self, name) not in choices:
                raise LaraArgumentError(f"{name}={getattr(self, name)!r}, but {' or '.join(choices)} is expected")
        check_share("reconstruct", self.reconstruct)
        check_folder("output", Path(self.output))
        if not self.videos:
            raise LaraArgumentError("videos=(): name at least one folder of videos")

    def filled(self) -> PretrainSettings:
        """With the preset's values where none were given."""
        given = {name: getattr(self, name) for name in _PRESETS[self.preset]}
        chosen = {name: _PRESETS[self.preset][name] if value is None else value for name, value in given.items()}
        return dataclasses.replace(self, **chosen)

    def model_config(self) -> LatentActionConfig:
        """The LAM's configuration: the preset, and what the file `config` sets otherwise.

        Raises:
            LaraArgumentError: the file names an unknown field, or a value is out of range.
            AdapterFormatError: it is missing or no JSON object.
        """
        if self.config is not None and not self.config.exists():
            raise LaraArgumentError(
                f"config={self.config} does not exist; a JSON file of LatentActionConfig is expected"
            )
        changes: dict[str, Any] = {} if self.config is None else read_json(self.config)
        if changes.get("format") == FORMAT:
            return LatentActionConfig.from_dict(changes, str(self.config))
        fields = [field.name for field in dataclasses.fields(LatentActionConfig)]
        if unknown := sorted(changes.keys() - set(fields)):
            near = [each for name in unknown for each in difflib.get_close_matches(name, fields, 1)]
            raise LaraArgumentError(
                f"config={self.config}: not a field of LatentActionConfig: {', '.join(unknown)}"
                + (f"; did you mean {', '.join(near)}?" if near else "")
            )
        if self.preset == "paper":
            return LatentActionConfig.paper(**changes)
        # a quarter of the steps, as tiny() asks for
        warmup = min((self.filled().steps or 0) // 4, 1000)
        return LatentActionConfig.tiny(**{"vq_warmup_steps": warmup, **changes})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        plain = dataclasses.asdict(self)
        return plain | {
            "videos": [str(path) for path in self.videos],
            "output": str(self.output),
            "cameras": list(self.cameras),
            "episodes": list(self.episodes),
            "skip": list(self.skip),
            "config": None if self.config is None else str(self.config),
            "actions": None if self.actions is None else str(self.actions),
        }


_LEAST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "weight_decay": 0, "clip": 0, "chain": 1,
    "shuffle_frames": 1, "workers": 1, "seed": 0, "log_every": 1, "health_every": 1, "health_pairs": 1, "save_every": 1,
    "keep": 1,
}  # fmt: skip

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 350_000, "batch_size": 64, "lr": 1e-4, "chain": 4},
    "tiny": {"steps": 3000, "batch_size": 32, "lr": 5e-4, "chain": 1},
}


def upgrade_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved run under today's names."""
    settings = {
        "decoder": "av",
        "index": "whole",
        "episodes": [],
        "skip": [],
        "reconstruct": 1.0,
        "actions": None,
        "action_weight": 1.0,
        "augment": False,
        **saved,
    }  # once the only choices
    frames, seconds = settings.pop("gap_frames", None), settings.pop("gap_seconds", None)
    settings.setdefault("gap", str(Gap(seconds=seconds) if seconds is not None else Gap(frames=frames or 5)))
    return settings
