"""Record episodes as tensors, and draw training batches from them.

A *table* is a dict of tensors with one row per kept frame: what a policy observes at that moment, the actions that
followed, and the row of the frame C steps later, which only the latent action model uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples import metaworld_sim
from examples.demo.stages import Progress

HORIZON = 16  # actions per chunk, and C of the latent action model: both span the same 16 steps
SPLITS = {"demos": 0, "heldout": 1, "play": 2, "evaluation": 3}
# not in SPLITS, whose count numbers the recorded runs
HELDOUT_PLAY = "heldout_play"  # with its actions, to measure by
EXPERT_VIDEO = "expert_video"  # experts whose actions are for the ceiling and to measure by
_FURTHER = {HELDOUT_PLAY: 20_000, EXPERT_VIDEO: 40_000}

Table = dict[str, Tensor]
_NOT_INPUTS = ("image", "clean", "state", "task", "action", "action_mask", "future", "valid", "episode")


def distractor_seeds(split: str, seed: int, rows: int) -> NDArray[np.int64]:
    """Return the seeds of the distractors in the frames of a split, row by row."""
    return np.arange(rows) + metaworld_sim.frame_seed(split_seed(split, seed), 0)


def split_seed(split: str, seed: int) -> int:
    """Number the start positions of a split; no two splits and no two seeds share one."""
    return _FURTHER[split] + seed if split in _FURTHER else len(SPLITS) * seed + SPLITS[split]


def collect(folder: Path, progress: Progress, *, task: str, counts: dict[str, int], play_steps: int, seed: int) -> None:
    """Record one task: demonstrations, held-out demonstrations, and play without actions. A job.

    Args:
        folder: gets one file per split.
        progress: called after each episode.
        task: name of the task.
        counts: number of episodes of each split.
        play_steps: length of a play episode.
        seed: of the run.
    """
    scene = metaworld_sim.Scene(task)
    for split, count in counts.items():
        episodes: list[metaworld_sim.Episode] = []
        index = 0
        while len(episodes) < count:
            number = split_seed(split, seed)
            if split == "play":
                episode = scene.record(number, index, max_steps=play_steps, noise=0.6)
                episode.actions[:] = np.nan  # action-free video: any use of an action would show as NaN
            else:
                episode = scene.record(number, index, max_steps=150, after_success=8)
            if episode.success or split == "play":
                episodes.append(episode)
                progress(1)
            index += 1
        torch.save(tabulate(episodes), folder / f"{split}.pt")


def collect_expert_video(folder: Path, progress: Progress, *, task: str, episodes: int, seed: int) -> None:
    """Record successful episodes of one task's expert, from starts of their own. A job.

    Args:
        folder: gets `expert_video.pt`.
        progress: called after each episode that is kept.
        task: name of the task.
        episodes: how many to keep.
        seed: of the run.
    """
    scene, recorded, index = metaworld_sim.Scene(task), list[metaworld_sim.Episode](), 0
    while len(recorded) < episodes:
        episode = scene.record(split_seed(EXPERT_VIDEO, seed), index, max_steps=150, after_success=8)
        if episode.success:
            recorded.append(episode)
            progress(1)
        index += 1
    torch.save(tabulate(recorded), folder / f"{EXPERT_VIDEO}.pt")


def collect_heldout_play(
    folder: Path, progress: Progress, *, task: str, episodes: int, play_steps: int, seed: int
) -> None:
    """Record play of one task that no model learns from, with its actions. A job.

    Args:
        folder: gets `heldout_play.pt`.
        progress: called after each episode.
        task: name of the task.
        episodes: how many.
        play_steps: length of each.
        seed: of the run.
    """
    scene, recorded = metaworld_sim.Scene(task), []
    for index in range(episodes):
        recorded.append(scene.record(split_seed(HELDOUT_PLAY, seed), index, max_steps=play_steps, noise=0.6))
        progress(1)
    torch.save(tabulate(recorded), folder / f"{HELDOUT_PLAY}.pt")


class Episode(Protocol):
    """What a table is made of: frames uint8 [F, 3, H, W], one per kept step; states [T, S]; actions [T, A]."""

    frames: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]


def tabulate(episodes: Sequence[Episode]) -> Table:
    """Lay episodes out in rows, one per kept frame; `future` is the row HORIZON steps later, or the row itself."""
    parts: dict[str, list[Any]] = {key: [] for key in ("frame", "state", "action", "action_mask", "episode")}
    for number, episode in enumerate(episodes):
        kept = np.arange(0, len(episode.actions), metaworld_sim.FRAME_SKIP)
        steps = kept[:, None] + np.arange(HORIZON)
        real = steps < len(episode.actions)
        parts["frame"].append(episode.frames)
        parts["state"].append(episode.states[kept])
        parts["action"].append(episode.actions[np.where(real, steps, 0)] * real[..., None])
        parts["action_mask"].append(np.broadcast_to(real[..., None], (*real.shape, episode.actions.shape[1])))
        parts["episode"].append(np.full(len(kept), number))
    table = {key: torch.from_numpy(np.concatenate(value)) for key, value in parts.items()}
    table["action_mask"] = table["action_mask"].float()
    table["future"] = _rows_ahead(table["episode"], HORIZON)
    return table


def _rows_ahead(episode: Tensor, gap: int) -> Tensor:
    """Return for each row the row `gap` steps later, or the row itself if its episode [F] ends before."""
    row, ahead = torch.arange(len(episode)), gap // metaworld_sim.FRAME_SKIP
    later = (row + ahead).clamp_max(len(episode) - 1)
    return torch.where((row + ahead < len(episode)) & (episode[later] == episode), later, row)


def load_table(
    folders: list[Path], split: str, *, distractors: bool, seed: int, gap: int = HORIZON, first: int | None = None
) -> Table:
    """Join the tasks' recordings, and add to each frame its own distractors, the same in every stage.

    Args:
        folders: one per task, as :func:`collect` wrote them.
        split: a key of `SPLITS`, `HELDOUT_PLAY` or `EXPERT_VIDEO`.
        distractors: whether to add distractors to the frames.
        seed: of the run.
        gap: steps from a frame to its future one; a multiple of the steps between kept frames.
        first: keep only the first episodes of each task; None: all.

    Returns:
        `image` [F, 3, H, W] uint8, `state` [F, 4], `task` [F], `action` and `action_mask` [F, 16, 4], `future` [F]
        (row of the frame `gap` steps later), `valid` [F] (whether there is one), `episode` [F], `clean` (frames without
        distractors).
    """
    joined: dict[str, list[Tensor]] = {}
    rows = episodes = 0
    for task, folder in enumerate(folders):
        table = torch.load(folder / f"{split}.pt", weights_only=True)
        if first is not None:
            table = {key: value[table["episode"] < first] for key, value in table.items()}
        table["task"] = torch.full((len(table["frame"]),), task)
        if gap != HORIZON:
            table["future"] = _rows_ahead(table["episode"], gap)
        table["valid"] = table["future"] != torch.arange(len(table["frame"]))
        table["future"] = table["future"] + rows
        rows += len(table["frame"])
        table["episode"] = table["episode"] + episodes
        episodes = int(table["episode"].max()) + 1
        for key, value in table.items():
            joined.setdefault(key, []).append(value)
    result = {key: torch.cat(value) for key, value in joined.items()}
    result["clean"] = result["image"] = result.pop("frame")
    if distractors:
        seeds = distractor_seeds(split, seed, rows)
        result["image"] = torch.from_numpy(metaworld_sim.add_distractors(result["clean"].numpy(), seeds))
    return result


def gather(table: Table, rows: Tensor) -> Table:
    """Make a batch of rows: the policy's inputs, and LARA's pair of frames with its flag."""
    more = [key for key in table if key not in _NOT_INPUTS]  # further views
    batch = {key: table[key][rows] for key in ("image", "state", "task", "action", "action_mask", *more)}
    future = table["image"][table["future"][rows]]
    return {**batch, "lara_frames": torch.stack([batch["image"], future], 1), "lara_frames_valid": table["valid"][rows]}


def row_batches(table: Table, size: int, steps: int, seed: int, *, pairs_only: bool = False) -> Iterator[Tensor]:
    """Draw rows, shuffled over all episodes; the order depends on the seed alone.

    Args:
        table: the rows.
        size: rows per batch.
        steps: number of batches.
        seed: of the order.
        pairs_only: draw only rows that have a future frame.

    Yields:
        [size] int64: row indices.
    """
    random = torch.Generator().manual_seed(seed)
    rows = table["valid"].nonzero().squeeze(1) if pairs_only else torch.arange(len(table["valid"]))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=random)]])
        yield order[:size]
        order = order[size:]


def batches(table: Table, size: int, steps: int, seed: int, *, pairs_only: bool = False) -> Iterator[Table]:
    """Draw batches: :func:`gather` of the rows of :func:`row_batches`."""
    for rows in row_batches(table, size, steps, seed, pairs_only=pairs_only):
        yield gather(table, rows)
