"""Train the policy on a few demonstrations and on video of experts, whose actions are decoded, true or not used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from examples.demo.data import EXPERT_VIDEO, HORIZON, Table, batches, load_table
from examples.demo.eval import action_error
from examples.demo.probe import ridge_probe
from examples.demo.stages import Progress
from examples.lam_training import LOG_EVERY, adamw_cosine, log
from examples.metaworld_sim import FRAME_SKIP
from examples.mini_vla import MiniVLA, MiniVLAConfig
from examples.refine_lam.codes import encode
from examples.refine_lam.pseudo_labels import decode_actions, probe_rows
from lara_adapter import attach_lara
from lara_adapter.lam.label.decoder import Demonstration, fit_decoder
from lara_adapter.storage.files import write_json

Labels = Literal["none", "decoded", "true", "aligned"]

_GAP = HORIZON // FRAME_SKIP  # in kept frames


def train_with_video(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    video: list[Path],
    labels: Labels,
    lam: Path | None,
    distractors: bool,
    steps: int,
    batch: int,
    lr: float,
    execute: int,
    seed: int,
    lara_options: dict[str, Any] | None = None,
) -> None:
    """Train the policy on both halves of each batch: demonstrations, and video with the state hidden. A job.

    All arms share initial weights, demonstrations, their order and their noise; without video labels the second half of a
    batch is left out, so that a step sees as many demonstrations as in the other arms.

    Args:
        folder: gets `policy.pt`, `history.json`, `action_error.json`, and with decoded labels `labels.json`.
        progress: called after each step.
        data: recordings of :func:`examples.demo.data.collect`.
        video: recordings of :func:`examples.demo.data.collect_expert_video`.
        labels: what is known of the video's actions: "none" (it is not used), "decoded" from latent actions by a regression
            fitted on the demonstrations, "true", the ceiling, or "aligned": none, it is there for LARA alone.
        lam: folder of the latent action model; for decoded labels and for LARA.
        lara_options: arguments of `attach_lara`, for LARA on the demonstrations and on the video; None: no LARA.
        distractors: whether frames have distractors.
        steps: number of training steps.
        batch: rows per batch, both halves together.
        lr: peak learning rate.
        execute: actions of a chunk that are executed; their error is measured.
        seed: of weights, data order and noise.
    """
    demos = load_table(data, "demos", distractors=distractors, seed=seed)
    torch.manual_seed(seed)
    policy = MiniVLA(MiniVLAConfig(num_tasks=len(data)))
    policy.set_state_statistics(demos["state"])
    pieces: Iterator[Table] | None = None
    lara = None if lara_options is None else attach_lara(policy, str(lam), **lara_options)
    if labels != "none":
        free = load_table(video, EXPERT_VIDEO, distractors=distractors, seed=seed)
        if labels == "decoded":
            assert lam is not None
            free, quality = label_video(lam, demos, free)
            write_json(folder / "labels.json", quality)
        # a video does not show the state: two frames of it would give the movement away
        free["state"] = policy.state_mean.expand_as(free["state"]).clone()
        pieces = batches(free, batch // 2, steps, seed + 17, pairs_only=True)

    optimizer, schedule = adamw_cosine(policy, lr, steps)
    policy.train()
    history: dict[str, list[float]] = {}
    for step, rows in enumerate(batches(demos, batch // 2, steps, seed)):
        loss = policy(rows)["loss"]
        labelled = float(loss.detach())
        if pieces is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1_000_003 * seed + step)
                if labels == "aligned":
                    loss = loss + aligned_loss(policy, next(pieces))
                else:
                    loss = loss + policy(next(pieces))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(1)
        if step % LOG_EVERY == 0 or step == steps - 1:
            log(history, step=step, action_loss=labelled, video_loss=float(loss.detach()) - labelled)
    write_json(folder / "history.json", history)
    if lara is not None:
        lara.detach()
    torch.save(policy.state_dict(), folder / "policy.pt")
    held_out = load_table(data, "heldout", distractors=distractors, seed=seed)
    write_json(folder / "action_error.json", {"action_error": action_error(policy.eval(), held_out, execute, seed)})


def aligned_loss(policy: MiniVLA, rows: Table) -> Tensor:
    """LARA's losses on video whose actions are not known: the policy gets noise for them, and no action loss."""
    unknown = {"action": torch.randn_like(rows["action"]), "action_mask": torch.ones_like(rows["action_mask"])}
    policy({**rows, **unknown})
    total: Tensor = policy.lara.losses.total
    return total


def label_video(lam: Path, demos: Table, free: Table) -> tuple[Table, dict[str, float]]:
    """The video with actions decoded from its latent actions as `lara label --actions` does; and how good they are.

    Returns:
        A table whose `action` is decoded and whose `action_mask` is 1 in rows of a pair; R2 of the mean movement and of the
        whole chunk against the true actions, which are not read before; `ridge`, that of the chunk by a ridge regression
        from z of its pair alone; `left_out`, R2 on demonstrations left out of the fit, the only one that is known of real
        video; and `still`, the first of a ridge regression from z of two equal frames.
    """
    known, z = encode(lam, demos)["z"], encode(lam, free)["z"]
    fitted = fit_decoder([each for _, each in _episodes(demos, known)], _GAP, least=-math.inf)
    decoded = torch.zeros_like(free["action"][:, :FRAME_SKIP].flatten(1))
    for rows, episode in _episodes(free, z):
        decoded[rows] = fitted.decoder.decode(episode.latent, episode.valid)
    rows = free["valid"]
    actions = torch.zeros_like(free["action"])
    places = rows.nonzero() + torch.arange(_GAP)
    actions[rows] = decoded[places].unflatten(2, (FRAME_SKIP, -1)).flatten(1, 2)
    still = [encode(lam, {**table, "future": torch.arange(len(table["future"]))})["z"] for table in (demos, free)]
    quality = {
        "r2": _r2(actions[rows][..., :3].mean(1), free["action"][rows][..., :3].mean(1)),
        "r2_chunk": _chunk_r2(actions, free),
        "r2_ridge": _chunk_r2(decode_actions(demos, known, free, z)[0], free),
        "r2_left_out": fitted.quality["r2"],
        "r2_still": ridge_probe(_means(demos, still[0]), _means(free, still[1])).r2,
    }
    mask = torch.zeros_like(free["action_mask"])
    mask[rows] = 1
    return {**free, "action": actions, "action_mask": mask}, quality


def _episodes(table: Table, z: Tensor) -> Iterator[tuple[slice, Demonstration]]:
    """Rows of each episode, and what a decoder needs of it; a frame's action is those of its steps, one after the other."""
    start = 0
    for length in table["episode"].unique_consecutive(return_counts=True)[1].tolist():
        rows = slice(start, start := start + length)
        yield rows, Demonstration(z[rows], table["valid"][rows], table["action"][rows, :FRAME_SKIP].flatten(1))


def _means(table: Table, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    latents, chunks, episode = probe_rows(table, z)
    return latents, chunks.unflatten(1, (-1, 3)).mean(1), episode


def _chunk_r2(actions: Tensor, free: Table) -> float:
    rows = free["valid"]
    return _r2(actions[rows][..., :3].flatten(1), free["action"][rows][..., :3].flatten(1))


def _r2(predicted: Tensor, true: Tensor) -> float:
    return float(1 - (predicted - true).square().sum() / (true - true.mean(0)).square().sum())
