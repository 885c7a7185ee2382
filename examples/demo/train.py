"""Train a latent action model on video alone, and the policy with or without LARA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from examples.demo.data import HORIZON, Table, batches, load_table
from examples.demo.eval import action_error, load_policy
from examples.demo.stages import Progress
from examples.lam_training import LOG_EVERY, adamw_cosine, log, optimise_lam
from examples.mini_vla import MiniVLA, MiniVLAConfig
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, load_lara
from lara_adapter.lam.image_encoder import describe_image_encoder
from lara_adapter.lam.pretrain.labelled import LabelledPairs
from lara_adapter.storage.files import read_json, write_json


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
    reconstruct: float = 1.0,
    labelled: int = 0,
    augmented: bool = False,
    encoder: Path | None = None,
    subtracted: bool = False,
) -> None:
    """Stage 1 of the paper at small scale: a latent action model from play video without actions. A job.

    Args:
        folder: gets `lam/` and `history.json`.
        progress: called after each step.
        data: recordings.
        distractors: whether frames have distractors.
        steps: number of training steps.
        batch: pairs per batch.
        lr: peak learning rate.
        seed: of weights and data order.
        gap: C, steps between the frames of a pair.
        video: number of play episodes per task; None: all.
        reconstruct: part of the pairs whose future frame is predicted, drawn at each step.
        labelled: demonstrations per task whose actions have to be read off z beside that.
        augmented: the inverse dynamics model sees random squares and light.
        encoder: folder of a frozen vision backbone for frames of 64 pixels; None: the LAM's own encoder.
        subtracted: the latent of a still pair is subtracted (`subtract_still`).
    """
    torch.manual_seed(seed)
    known = None
    if labelled:
        demos = load_table(data, "demos", distractors=distractors, seed=seed, gap=gap, first=labelled)
        rows = demos["valid"].nonzero().squeeze(1)
        known = LabelledPairs(demos["image"], rows, demos["future"][rows], demos["action"][rows].mean(1), seed)
    play = load_table(data, "play", distractors=distractors, seed=seed, gap=gap, first=video)
    changes = describe_image_encoder(str(encoder), image_size=64) if encoder else {}
    changes |= {"subtract_still": True} if subtracted else {}
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=steps // 4, **changes))
    stream = batches(play, batch, steps, seed, pairs_only=True)
    history = optimise_lam(lam, stream, lr, steps, progress, reconstruct, known, seed if augmented else None)
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
    reconstruct: float = 1.0,
) -> None:
    """The control: train the LAM on the same demonstrations, order and steps as LARA does, but without alignment. A job."""
    demos = load_table(data, "demos", distractors=distractors, seed=seed)
    model = LatentActionModel.from_pretrained(lam)
    history = optimise_lam(model, batches(demos, batch, steps, seed), lr, steps, progress, reconstruct)
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
    config: dict[str, Any] | None = None,
) -> None:
    """Train the policy on a few demonstrations. A job.

    All arms share initial weights, data, order and noise; they differ only in the line that attaches LARA.

    Args:
        folder: gets `policy.pt`, `history.json`, `action_error.json`, and with LARA `adapter/`, `lam/` and
            `alignment.json`.
        progress: called after each step.
        data: recordings.
        lam: folder of the pre-trained latent action model; None without LARA.
        lara_options: arguments of `attach_lara`; None: no LARA.
        distractors: whether frames have distractors.
        steps: number of training steps.
        batch: rows per batch.
        lr: peak learning rate.
        execute: actions of a chunk that are executed; their error is measured.
        seed: of weights, data order and noise.
        gap: C, steps between the two frames of the LAM.
        config: fields of `MiniVLAConfig` to change; None: the defaults.
    """
    demos = load_table(data, "demos", distractors=distractors, seed=seed, gap=gap)
    torch.manual_seed(seed)
    policy, lara, history = MiniVLA(MiniVLAConfig(num_tasks=len(data), **(config or {}))), None, {}
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
            log(history, step=step, action_loss=action_loss, **(lara.metrics() if lara else {}))

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
    """Compute the alignment loss on a fixed batch with fixed noise, on a copy: a training forward updates the codebook."""
    copied = copy.deepcopy(policy).train()
    torch.manual_seed(seed)
    copied(next(batches(table, batch, 1, seed)))
    return float(copied.lara.losses.align.detach())


def reload_adapter(
    folder: Path, progress: Progress, *, data: list[Path], trained: Path, distractors: bool, batch: int, seed: int
) -> None:
    """Load a trained policy and its adapter, and compare them with the ones that were saved. A job.

    Args:
        folder: gets `reloaded.json`.
        progress: called once.
        data: recordings.
        trained: folder that :func:`train_policy` wrote.
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
