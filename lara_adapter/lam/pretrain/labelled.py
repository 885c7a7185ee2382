"""A few pairs whose actions are known, in the training of a LAM (LAOM, https://arxiv.org/abs/2502.00379).

What moves in a video is not the robot alone. Beside L_LAM a small network reads the action off z on pairs of a few
demonstrations; z then holds more of what the robot did and less of the rest. The network is thrown away at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...data import PairBatch
from ...data.formats import open_dataset
from ...data.gap import Gap
from ...errors import DatasetError, LaraArgumentError
from ..identity import action_fingerprint
from ..model import LatentActionModel, LatentActionOutput
from ..pixels import resize
from .augment import augment
from .shared_frames import share_frames

__all__ = ["Labelled", "LabelledPairs", "SupervisedLam", "read_labelled"]

_HIDDEN = 128


class Labelled(NamedTuple):
    """B pairs: present and future uint8 [B, 3, S, S], and their mean actions float32 [B, A], standardised."""

    present: Tensor
    future: Tensor
    actions: Tensor


class LabelledPairs:
    """All pairs of the demonstrations, in memory.

    Args:
        frames: [F, 3, S, S] uint8.
        present: [P] int64, which frame is I_t.
        future: [P] int64, which one is I_{t+C}.
        actions: [P, A] float32, the mean action of the C steps.
        seed: of what is drawn.
        fingerprint: of the actions, see :func:`~lara_adapter.lam.identity.action_fingerprint`.
    """

    def __init__(
        self,
        frames: Tensor,
        present: Tensor,
        future: Tensor,
        actions: Tensor,
        seed: int,
        fingerprint: str | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        spread = actions.std(0, correction=0)
        self.frames, self.present, self.future, self.seed = frames, present, future, seed
        # what hardly moves would be noise of unit size
        self.actions = (actions - actions.mean(0)) / torch.where(spread > 1e-6, spread, torch.inf)

    @property
    def width(self) -> int:
        """A, numbers of an action."""
        return self.actions.shape[1]

    def draw(
        self, count: int, number: int, rank: int = 0, device: torch.device | str = "cpu", *, augmented: bool = False
    ) -> Labelled:
        """Pairs number `number` of a process, a function of seed, number and rank alone; see :func:`augment`."""
        seed = (self.seed, number, rank)
        pick = torch.from_numpy(np.random.default_rng(list(seed)).integers(len(self.present), size=count))
        frames = self.frames[torch.cat([self.present[pick], self.future[pick]])].to(device)
        if augmented:
            frames = augment(frames, (*seed, 1))
        present, future = frames.chunk(2)
        return Labelled(present, future, self.actions[pick].to(device))


def read_labelled(path: Path, gap: Gap, cameras: Sequence[str], size: int, seed: int) -> LabelledPairs:
    """Read every pair of a dataset with actions; 3 size^2 bytes a frame.

    Args:
        path: of the dataset, in any format.
        gap: C.
        cameras: which to use, where it has some of these names; else all.
        size: side of the frames in pixels.
        seed: of what is drawn.

    Raises:
        LaraArgumentError: the dataset has no camera, no actions or none that change, or no pair that far apart.
        DatasetError: it is none, or every episode is damaged.
    """
    dataset = open_dataset(path, argument="actions")
    steps, views = gap.in_frames(dataset.fps), dataset.select_cameras(list(filter(dataset.has_camera, cameras)))
    if not views:
        raise LaraArgumentError(f"actions: {dataset.name} has no camera")
    frames: list[Tensor] = []
    present: list[Tensor] = []
    actions: list[Tensor] = []
    used: list[np.ndarray] = []
    count = 0
    damaged: dict[int, str] = {}
    for episode in dataset.episodes:
        try:
            known = dataset.known_actions(episode)
            if not len(known):
                raise DatasetError("it has no frames")
            sums = np.concatenate([np.zeros_like(known[:1]), known]).cumsum(0, dtype=np.float64)
            means = torch.from_numpy((sums[steps:] - sums[:-steps])[: max(0, len(known) - steps)] / steps).float()
            seen = [_decode(dataset, camera, episode, size) for camera in views]
            if any(len(each) != len(known) for each in seen):
                raise DatasetError(f"it has {len(known)} actions and {[len(each) for each in seen]} frames")
        except DatasetError as error:
            damaged[episode.number] = str(error)
            continue
        used.append(known)
        for each in seen:
            present.append(torch.arange(len(means)) + count)
            count += len(each)
            frames.append(each)
            actions.append(means)
    dataset.leave_out(damaged)
    labels = torch.cat(actions)
    if not len(labels):
        raise LaraArgumentError(f"actions: no episode of {dataset.name} is longer than the gap of {steps} frames")
    if not (labels.std(0, correction=0) > 1e-6).any():
        raise LaraArgumentError(f"actions: the actions of {dataset.name} never change")
    first = torch.cat(present)
    return LabelledPairs(torch.cat(frames), first, first + steps, labels, seed, action_fingerprint(used))


def _decode(dataset: Any, camera: str, episode: Any, size: int) -> Tensor:
    """[T, 3, S, S] uint8."""
    for _, frames in dataset.frames(camera, [episode]):
        return torch.stack([resize(torch.from_numpy(frame).permute(2, 0, 1), size) for frame in frames])
    raise DatasetError("it has no frames")


class SupervisedLam(nn.Module):
    """A LAM, and a network that reads actions off its continuous z.

    Args:
        lam: the model.
        width: A, numbers of an action.
    """

    def __init__(self, lam: LatentActionModel, width: int) -> None:
        super().__init__()
        self.lam = lam
        self.head = nn.Sequential(nn.Linear(lam.latent_width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, width))

    def forward(
        self, *pair: Tensor, labelled: Labelled, shared: PairBatch | None = None, **options: Any
    ) -> tuple[LatentActionOutput, Tensor]:
        """What the LAM gives for pairs of video, and the mean squared error of the actions; 1: that of their mean.

        Args:
            pair: arguments of the LAM, as are `options`.
            labelled: pairs whose actions are known.
            shared: the batch that the pairs are of, so that a frozen encoder sees each of its frames once.
        """
        with contextlib.nullcontext() if shared is None else share_frames(self.lam, shared):
            output: LatentActionOutput = self.lam(*pair, **options)
        latent = self.lam.encode(labelled.present, labelled.future).continuous
        return output, (self.head(latent.flatten(1)).float() - labelled.actions).square().mean()
