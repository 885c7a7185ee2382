"""Label demonstrations with a trained LAM: tokens for every pair, and actions decoded from z by a linear head.

Unlabelled demonstrations are video: neither their actions nor the robot's state are known. So the policies trained here
see only image and task; with the state, two frames would reveal the movement without any latent action.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo.data import HORIZON, Table, load_table
from examples.demo.eval import load_policy
from examples.demo.probe import Probe, r2_interval, ridge, ridge_probe
from examples.demo.stages import Progress
from examples.demo.train import train_policy
from examples.mini_vla import MiniVLA
from examples.refine_lam.codes import code_action_information, encode
from lara_adapter.storage.files import write_json

UNLABELLED = 1000  # added to the seed of the unlabelled demonstrations, for their own starts and distractors


def load_demonstrations(
    data: list[Path], unlabelled: list[Path], *, distractors: bool, seed: int
) -> tuple[Table, Table, Table]:
    """Load the labelled, the unlabelled and the held-out demonstrations of one seed, as `load_table` returns them."""
    return (
        load_table(data, "demos", distractors=distractors, seed=seed),
        load_table(unlabelled, "demos", distractors=distractors, seed=UNLABELLED + seed),
        load_table(data, "heldout", distractors=distractors, seed=seed),
    )


def label(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    unlabelled: list[Path],
    lam: Path,
    distractors: bool,
    seed: int,
) -> None:
    """Label demonstrations with a LAM, and measure the labels against the true actions. A job.

    Args:
        folder: gets `labels.pt`: `labelled`, `unlabelled`, `heldout`, each as `encode` returns it, and `actions`
            [F, 16, 4], decoded for the unlabelled; and `measured.json`.
        progress: called once.
        data: recordings with labelled and held-out demonstrations.
        unlabelled: recordings whose actions are only used to measure.
        lam: the model.
        distractors: whether frames have distractors.
        seed: of the run.
    """
    tables = load_demonstrations(data, unlabelled, distractors=distractors, seed=seed)
    labelled, free, held_out = tables
    encoded = [encode(lam, table) for table in tables]
    actions, penalty = decode_actions(labelled, encoded[0]["z"], free, encoded[1]["z"])
    fitted = probe_rows(labelled, encoded[0]["z"])
    probes = {
        "pseudo_labels": ridge_probe(fitted, probe_rows(free, encoded[1]["z"])),
        "chunk_probe": ridge_probe(fitted, probe_rows(held_out, encoded[2]["z"])),
    }
    rows = free["valid"]
    error = (actions[rows] - free["action"][rows])[..., :3].square().mean()
    measured: dict[str, dict[str, Any]] = {name: probe_content(probe) for name, probe in probes.items()}
    measured["pseudo_labels"] |= {"error": float(error), "ridge_penalty": penalty}
    measured["information"] = code_action_information(encoded[1]["codes"], free)
    write_json(folder / "measured.json", measured)
    kept = dict(zip(("labelled", "unlabelled", "heldout"), encoded))
    torch.save({**kept, "actions": actions}, folder / "labels.pt")
    progress(1)


def probe_content(probe: Probe) -> dict[str, Any]:
    """A probe's result as JSON: R2, its interval, and the data for a bootstrap over demonstrations."""
    parts = {"errors": probe.errors.tolist(), "variances": probe.variances.tolist()}
    return {"r2": probe.r2, "interval": list(r2_interval(probe)), **parts}


def probe_rows(table: Table, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of `ridge_probe`: latents [N, D] of all pairs, the movement of their chunks [N, 48], and their episodes [N].

    Without the gripper: its command is constant within a task, so it would only measure task recognition.
    """
    rows = table["valid"]
    return z[rows], table["action"][rows, :, :3].flatten(1), table["episode"][rows]


def decode_actions(labelled: Table, labelled_z: Tensor, free: Table, free_z: Tensor) -> tuple[Tensor, float]:
    """Fit a ridge regression from latents to chunks on the labelled demonstrations, and decode the unlabelled with it.

    Args:
        labelled: demonstrations with known actions.
        labelled_z: [F, D] their latents.
        free: demonstrations to label; their actions are not read.
        free_z: [G, D] their latents.

    Returns:
        Actions [G, 16, 4] in [-1, 1], 0 in rows without a future frame; the penalty, chosen by cross-validation over
        the labelled demonstrations.
    """
    fitted = probe_rows(labelled, labelled_z)
    penalty = ridge_probe(fitted, fitted).penalty
    chunks = labelled["action"][labelled["valid"]].flatten(1)
    (decoded,) = ridge(fitted[0].double(), chunks.double(), free_z[free["valid"]].double(), [penalty])
    actions = torch.zeros(len(free_z), HORIZON, chunks.shape[1] // HORIZON)
    actions[free["valid"]] = decoded.float().unflatten(1, (HORIZON, -1)).clamp(-1, 1)
    return actions, penalty


def train_on_labels(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    unlabelled: list[Path],
    labels: Path | None,
    use_unlabelled: bool,
    distractors: bool,
    steps: int,
    batch: int,
    lr: float,
    execute: int,
    seed: int,
) -> None:
    """Train the demo's policy, without LARA and state, on labelled and pseudo-labelled demonstrations. A job.

    Args:
        folder: gets what `train_policy` writes.
        progress: called after each step.
        data: recordings with labelled and held-out demonstrations.
        unlabelled: recordings to add.
        labels: folder of :func:`label`, with the actions for the unlabelled ones; None: the true actions, as the ceiling.
        use_unlabelled: False: train on the labelled ones alone.
        distractors: whether frames have distractors.
        steps: number of training steps.
        batch: rows per batch.
        lr: peak learning rate.
        execute: actions of a chunk that are executed.
        seed: of the run.
    """
    labelled, free, held_out = load_demonstrations(data, unlabelled, distractors=distractors, seed=seed)
    if labels is not None:
        free["action"] = torch.load(labels / "labels.pt", weights_only=True)["actions"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        folders = []
        for task in range(len(data)):
            parts = [_of_task(labelled, task)]
            if use_unlabelled:
                parts.append(_of_task(free, task, pairs_only=True))
            folders.append(Path(scratch) / f"task-{task}")
            folders[-1].mkdir()
            torch.save(_join(parts), folders[-1] / "demos.pt")
            torch.save(_of_task(held_out, task), folders[-1] / "heldout.pt")
        # the frames already contain their distractors, the same as for the LAM
        options = {"distractors": False, "steps": steps, "batch": batch, "lr": lr, "execute": execute, "seed": seed}
        train_policy(folder, progress, data=folders, lam=None, lara_options=None, **options)


def _of_task(table: Table, task: int, *, pairs_only: bool = False) -> Table:
    """The rows of one task as `collect` writes them, without state and without pairs, which only a LAM would need."""
    keep = (table["task"] == task) & (table["valid"] | (not pairs_only))
    part = {key: table[key][keep] for key in ("state", "action", "action_mask", "episode")}
    part["state"] = torch.zeros_like(part["state"])
    return {**part, "frame": table["image"][keep], "future": torch.arange(int(keep.sum()))}


def _join(parts: list[Table]) -> Table:
    """Concatenate tables of one task."""
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {**joined, "future": torch.arange(len(joined["future"]))}


class WithoutState:
    """The demo's policy as :func:`train_on_labels` trained it: its state input is always zero."""

    def __init__(self, policy: MiniVLA) -> None:
        self.policy, self.config = policy, policy.config

    @classmethod
    def load(cls, file: Path) -> WithoutState:
        """Load a policy, in eval mode."""
        return cls(load_policy(file))

    def get_action(self, observation: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """Sample a chunk as `MiniVLA.get_action` does, ignoring the state."""
        return self.policy.get_action({**observation, "state": torch.zeros_like(observation["state"])}, noise)
