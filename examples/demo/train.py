"""Training: a latent action model on video alone, and the policy, with LARA or without."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from examples.demo.data import HORIZON, Table, batches, load_table
from examples.demo.eval import action_error, load_policy
from examples.demo.stages import Progress
from examples.mini_vla import MiniVLA, MiniVLAConfig
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara
from lara_adapter.storage.files import read_json, write_json

LOG_EVERY = 10

History = dict[str, list[float]]


def adamw_cosine(module: nn.Module, lr: float, steps: int) -> tuple[Optimizer, LambdaLR]:
    """Make AdamW over everything that trains, its learning rate falling to zero along a cosine after a short warm-up."""
    optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=1e-5)
    return optimizer, LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def optimise_lam(lam: LatentActionModel, stream: Iterator[Table], lr: float, steps: int, progress: Progress) -> History:
    """Train a latent action model by its own loss (LARA, Eq. 3): frames only, no actions and no policy."""
    history: History = {}
    optimizer, schedule = adamw_cosine(lam, lr, steps)
    lam.train()
    for step, batch in enumerate(stream):
        now, future = batch["lara_frames"].unbind(1)
        output = lam(now, future, batch["lara_frames_valid"])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        progress(1)
        if step % LOG_EVERY == 0 or step == steps - 1:
            over_copy = float(output.reconstruction_loss.detach() / output.copy_loss)
            _note(history, step=step, reconstruction_over_copy=over_copy, codes_used=float(output.codes_used))
    lam.eval()
    return history


def pretrain_lam(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    distractors: bool,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    gap: int = HORIZON,
    video: int | None = None,
) -> None:
    """Stage 1 of the paper in small: a latent action model from play video without actions. A job.

    Args:
        folder: gets `lam/` and `history.json`.
        progress: called after each step.
        data: recordings.
        distractors: whether frames hold them.
        steps: how many.
        batch: pairs in each.
        lr: peak learning rate.
        seed: of weights and order.
        gap: C, steps between the frames of a pair.
        video: episodes of play per task; None: all.
    """
    torch.manual_seed(seed)
    play = load_table(data, "play", distractors=distractors, seed=seed, gap=gap, first=video)
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=steps // 4))
    stream = batches(play, batch, steps, seed, pairs_only=True)
    history = optimise_lam(lam, stream, lr, steps, progress)
    lam.save_pretrained(folder / "lam")
    write_json(folder / "history.json", history)


def continue_lam(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    lam: Path,
    distractors: bool,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """The control: the LAM goes on as under LARA, same demonstrations, order and steps, but without alignment. A job."""
    demos = load_table(data, "demos", distractors=distractors, seed=seed)
    model = LatentActionModel.from_pretrained(lam)
    history = optimise_lam(model, batches(demos, batch, steps, seed), lr, steps, progress)
    model.save_pretrained(folder / "lam")
    write_json(folder / "history.json", history)


def train_policy(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    lam: Path | None,
    lara_options: dict[str, Any] | None,
    distractors: bool,
    steps: int,
    batch: int,
    lr: float,
    execute: int,
    seed: int,
    gap: int = HORIZON,
    size: dict[str, int] | None = None,
) -> None:
    """Train the policy on a few demonstrations. A job.

    Every arm has the same initial weights, data, order and noise; all that differs is the line that attaches LARA.

    Args:
        folder: gets `policy.pt`, `history.json`, `action_error.json`, and with LARA `adapter/`, `lam/` and
            `alignment.json`.
        progress: called after each step.
        data: recordings.
        lam: folder of the pre-trained latent action model; None without LARA.
        lara_options: what `attach_lara` gets; None: no LARA.
        distractors: whether frames hold them.
        steps: how many.
        batch: rows in each.
        lr: peak learning rate.
        execute: how many actions of a chunk are done: those whose error is measured.
        seed: of weights, order and noise.
        gap: C, steps between the two frames that the LAM sees.
        size: what changes of the policy's sizes, fields of `MiniVLAConfig`; None: nothing.
    """
    demos = load_table(data, "demos", distractors=distractors, seed=seed, gap=gap)
    torch.manual_seed(seed)
    policy, lara, history = MiniVLA(MiniVLAConfig(num_tasks=len(data), **(size or {}))), None, {}
    policy.set_state_statistics(demos["state"])

    if lara_options is not None:
        lara = attach_lara(policy, str(lam), **{"layer": -3, **lara_options})  # <- this line is LARA

    optimizer, schedule = adamw_cosine(policy, lr, steps)
    policy.train()
    for step, rows in enumerate(batches(demos, batch, steps, seed)):
        loss = policy(rows)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(1)
        if step % LOG_EVERY == 0 or step == steps - 1:
            action_loss = float(loss.detach() - (lara.losses.total.detach() if lara else 0))
            _note(history, step=step, action_loss=action_loss, **(lara.metrics() if lara else {}))

    write_json(folder / "history.json", history)
    if lara is not None:
        write_json(folder / "alignment.json", {"alignment": alignment_loss(policy, demos, batch, seed)})
        lara.save_pretrained(folder / "adapter")
        lara.detach()
        lara.lam.save_pretrained(folder / "lam")
    torch.save(policy.state_dict(), folder / "policy.pt")
    held_out = load_table(data, "heldout", distractors=distractors, seed=seed)
    write_json(folder / "action_error.json", {"action_error": action_error(policy.eval(), held_out, execute, seed)})


def alignment_loss(policy: MiniVLA, table: Table, batch: int, seed: int) -> float:
    """Compute the alignment loss on one fixed batch with fixed noise, on a copy: a training forward moves codes."""
    copied = copy.deepcopy(policy).train()
    torch.manual_seed(seed)
    copied(next(batches(table, batch, 1, seed)))
    return float(copied.lara.losses.align.detach())


def reload_adapter(
    folder: Path, progress: Progress, *, data: list[Path], trained: Path, distractors: bool, batch: int, seed: int
) -> None:
    """Load a trained policy and its saved adapter afresh, and compare with what they were. A job.

    Args:
        folder: gets `reloaded.json`.
        progress: called once.
        data: recordings.
        trained: what :func:`train_policy` wrote.
        distractors: as in training.
        batch: as in training.
        seed: as in training.
    """
    demos = load_table(data, "demos", distractors=distractors, seed=seed)
    rows = next(batches(demos, batch, 1, seed))
    policy = load_policy(trained / "policy.pt")
    noise = torch.randn(rows["action"].shape, generator=torch.Generator().manual_seed(seed))
    alone = policy.get_action(rows, noise)
    lara = load_lara(policy, trained / "adapter")
    attached = policy.get_action(rows, noise)
    loaded = alignment_loss(policy, demos, batch, seed)
    before = read_json(trained / "alignment.json")["alignment"]
    optimizer, _ = adamw_cosine(policy, 1e-4, 1)
    report = {
        "actions_identical": torch.equal(alone, attached),
        "alignment_trained": before,
        "alignment_loaded": loaded,
        "alignment_identical": before == loaded,
        "check": str(lara.check(rows, optimizer)),
    }
    write_json(folder / "reloaded.json", report)
    progress(1)


def _note(history: History, **values: float) -> None:
    for key, value in values.items():
        history.setdefault(key, []).append(value)
