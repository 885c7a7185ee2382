"""From a recording to the demo's tables (examples/demo/data.py), which MiniVLA and its latent action model train on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from examples.demo.data import tabulate
from examples.demo.stages import Progress
from examples.libero.dataset import JOURNAL, VIEWS
from examples.metaworld_sim import FRAME_SKIP
from lara_adapter.data.episodes import EpisodeDataset
from lara_adapter.storage.files import read_json

SIZE = 64  # pixels
STATE, ACTION = 8, 7  # numbers


@dataclasses.dataclass(frozen=True)
class Frames:
    """One episode; see examples.demo.data.Episode."""

    frames: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]


def shrink(frames: NDArray[np.uint8], size: int = SIZE) -> Tensor:
    """Mean over squares of pixels: uint8 [N, S, S, 3] -> [N, 3, size, size]; the same for training and for acting."""
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return F.interpolate(images, size=(size, size), mode="area").round().to(torch.uint8)


def make_tables(folder: Path, progress: Progress, *, root: Path, task: str, splits: dict[str, list[int]]) -> None:
    """Read one task of a recording. A job.

    Args:
        folder: gets one file for each split.
        progress: called after each episode.
        root: the recording.
        task: name of the task.
        splits: name of a split -> first and last of its episodes of the task, the last not included.
    """
    dataset = EpisodeDataset(root)
    numbers = [number for number, entry in enumerate(read_json(root / JOURNAL)["episodes"]) if entry["key"] == task]
    for split, (first, last) in splits.items():
        if last > len(numbers):
            raise ValueError(f"{root}: {len(numbers)} episodes of {task}, but {last} are expected")
        chosen = [episode for number in numbers[first:last] if (episode := dataset.episode(number))]
        views = {view: _images(dataset, name, chosen, progress) for view, name in VIEWS.items()}
        episodes = []
        for episode, images in zip(chosen, views["image"], strict=True):
            states = dataset.rows(episode, ["observation.state"])["observation.state"]
            actions = dataset.actions(episode)
            if actions is None:  # play: any use of an action would show as NaN
                actions = np.full((len(states), ACTION), np.nan)
            episodes.append(Frames(images.numpy(), states.astype(np.float32), actions.astype(np.float32)))
        table = tabulate(episodes)
        for view in VIEWS.keys() - {"image"}:
            table[view] = torch.cat(views[view])
        torch.save(table, folder / f"{split}.pt")


def instructions(root: Path) -> list[str]:
    """The text of each task of a recording, in the order of their tables."""
    entries = read_json(root / JOURNAL)["episodes"]
    return list({entry["key"]: entry["task"] for entry in entries}.values())


def _images(dataset: EpisodeDataset, camera: str, episodes: list[object], progress: Progress) -> list[Tensor]:
    """The kept frames of each episode: [ceil(T / FRAME_SKIP), 3, SIZE, SIZE]."""
    images = []
    for _, frames in dataset.frames(camera, episodes):
        kept = [shrink(frame[None])[0] for place, frame in enumerate(frames) if place % FRAME_SKIP == 0]
        images.append(torch.stack(kept))
        progress(1)
    return images
