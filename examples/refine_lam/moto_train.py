"""Train the latent-token policy on tokens of action-free video, then on the few labelled demonstrations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.demo.data import Table, row_batches
from examples.demo.eval import action_error
from examples.demo.stages import Progress
from examples.lam_training import LOG_EVERY, adamw_cosine
from examples.refine_lam.moto_gpt import MotoGPT, MotoGPTConfig
from examples.refine_lam.pseudo_labels import load_demonstrations
from lara_adapter.storage.files import write_json

_VIDEO = ("image", "task", "codes", "valid")
_DEMONSTRATION = (*_VIDEO, "action", "action_mask")


def train_moto_gpt(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    unlabelled: list[Path],
    labels: Path | None,
    distractors: bool,
    pretrain_steps: int,
    finetune_steps: int,
    batch: int,
    lr: float,
    execute: int,
    seed: int,
) -> None:
    """Train one policy on the tokens of one latent action model. A job.

    Args:
        folder: gets `moto_gpt.pt`, `history.json` and `measured.json`.
        progress: called after each step.
        data: recordings with labelled and held-out demonstrations.
        unlabelled: recordings of which only the video is used.
        labels: folder of `label`; None: no latent tokens, and so no video pre-training.
        distractors: whether frames have distractors.
        pretrain_steps: on the video of all but the held-out demonstrations.
        finetune_steps: on the labelled demonstrations.
        batch: rows per batch.
        lr: peak learning rate of each phase.
        execute: actions of a chunk that are executed; their error is measured.
        seed: of weights, data order and masks, which all policies of a seed share.
    """
    tables = load_demonstrations(data, unlabelled, distractors=distractors, seed=seed)
    labelled, free, held_out = tables
    torch.manual_seed(seed)
    policy = MotoGPT(MotoGPTConfig(num_tasks=len(data), use_codes=labels is not None))
    labelling = None if labels is None else torch.load(labels / "labels.pt", weights_only=True)
    for name, table in zip(("labelled", "unlabelled", "heldout"), tables):
        none = torch.zeros(len(table["valid"]), policy.config.codes, dtype=torch.long)
        table["codes"] = none if labelling is None else labelling[name]["codes"]
    history: dict[str, list[float]] = {}
    if labelling is not None:
        video = {key: torch.cat([labelled[key], free[key]]) for key in _VIDEO}
        optimise(policy, video, _VIDEO, batch, lr, pretrain_steps, seed, progress, history)
    optimise(policy, labelled, _DEMONSTRATION, batch, lr, finetune_steps, seed, progress, history)
    policy.eval().save(folder / "moto_gpt.pt")
    write_json(folder / "history.json", history)
    measured = {"action_error": action_error(policy, held_out, execute, seed)}
    if labelling is not None:
        measured |= code_scores(policy, held_out)
    write_json(folder / "measured.json", measured)


def optimise(
    policy: MotoGPT,
    table: Table,
    keys: tuple[str, ...],
    batch: int,
    lr: float,
    steps: int,
    seed: int,
    progress: Progress,
    history: dict[str, list[float]],
) -> None:
    """Train on rows of a table; without actions among `keys`, only on rows that have codes."""
    optimizer, schedule = adamw_cosine(policy, lr, steps)
    policy.train()
    for step, rows in enumerate(row_batches(table, batch, steps, seed, pairs_only="action" not in keys)):
        losses = policy({key: table[key][rows] for key in keys})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        schedule.step()
        progress(1)
        if step % LOG_EVERY == 0 or step == steps - 1:
            phase = "finetune" if "action" in keys else "pretrain"
            for name, value in losses.items():
                history.setdefault(f"{phase}_{name}", []).append(float(value.detach()))


@torch.no_grad()
def code_scores(policy: MotoGPT, table: Table) -> dict[str, float]:
    """Evaluate the codes that a policy generates for held-out demonstrations.

    Args:
        policy: the policy.
        table: rows with `codes`.

    Returns:
        `code_loss`, nats per code given the true earlier ones; `codes_right`, share of the generated codes that equal
        the LAM's.
    """
    loss = right = 0.0
    pairs: Tensor = table["valid"].nonzero().squeeze(1)
    for rows in pairs.split(256):
        part = {key: table[key][rows] for key in _VIDEO}
        loss += len(rows) * float(policy(part)["code_loss"])
        right += float((policy.generate(part["image"], part["task"]) == part["codes"]).float().mean(1).sum())
    return {"code_loss": loss / len(pairs), "codes_right": right / len(pairs)}
