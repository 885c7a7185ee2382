"""How much of the hand's motion is in a latent action, on play that no model learnt from, beside a ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.demo.data import HELDOUT_PLAY, load_table
from examples.demo.stages import Progress
from lara_adapter import LatentActionModel
from lara_adapter.lam.health.ceiling import train_ceiling
from lara_adapter.lam.health.kernel import fit_kernels
from lara_adapter.lam.health.motion import measure_motion
from lara_adapter.storage.files import write_json


class Pairs(NamedTuple):
    """All pairs of held-out play, 16 steps apart.

    now: [R, 3, H, W] uint8; later: likewise.
    targets: "displacement" of the hand [R, 3] metres, and "action" [R, 3], its mean command over the 16 steps.
    known: [R, state + tasks] state, of which the first three are the hand's place, and task.
    episode: [R] int.
    """

    now: Tensor
    later: Tensor
    targets: dict[str, Tensor]
    known: Tensor
    episode: Tensor


def load_pairs(play: list[Path], *, distractors: bool, seed: int, split: str = HELDOUT_PLAY, every: int = 1) -> Pairs:
    """Load recordings of play: those of :func:`examples.demo.data.collect_heldout_play`, or another split.

    Args:
        play: one folder per task.
        distractors: whether frames have distractors.
        seed: of the run.
        split: name of the recording.
        every: only the last of so many episodes, where the others are trained on.
    """
    table = load_table(play, split, distractors=distractors, seed=seed)
    rows = (table["valid"] & (table["episode"] % every == every - 1)).nonzero().squeeze(1)
    future = table["future"][rows]
    task = torch.nn.functional.one_hot(table["task"][rows], len(play)).float()
    targets = {
        "displacement": (table["state"][future] - table["state"][rows])[:, :3],
        "action": table["action"][rows, :, :3].mean(1),
    }
    known = torch.cat([table["state"][rows], task], 1)
    return Pairs(table["image"][rows], table["image"][future], targets, known, table["episode"][rows])


def find_ceiling(
    folder: Path,
    progress: Progress,
    *,
    play: list[Path],
    distractors: bool,
    seed: int,
    folds: int,
    widths: list[int],
    rates: list[float],
    split: str = HELDOUT_PLAY,
    every: int = 1,
) -> None:
    """Fit regressions, and train networks, with the labels on the pixels. A job.

    Args:
        folder: gets `ceiling.pt`, what they say of each pair [R, L], and `ceiling.json`, the networks that were tried.
        progress: called once.
        play: recordings.
        distractors: whether frames have distractors.
        seed: of the run.
        folds: of episodes, each predicted by what was trained on the others.
        widths: see :func:`~lara_adapter.lam.health.ceiling.train_ceiling`; none: regressions alone.
        rates: likewise.
        split: see :func:`load_pairs`.
        every: likewise.
    """
    pairs = load_pairs(play, distractors=distractors, seed=seed, split=split, every=every)
    frames, place = (pairs.now, pairs.later), pairs.known[:, :3]
    labels, tried = torch.cat(list(pairs.targets.values()), 1), {}
    seen = fit_kernels(*frames, labels, pairs.episode, states=place, folds=folds)
    if widths:
        found = train_ceiling(*frames, labels, pairs.episode, states=place, folds=folds, widths=widths, rates=rates)
        seen = torch.cat([seen, found.prediction.double()], 1)
        tried = {"chosen": found.chosen._asdict(), "tried": [each._asdict() for each in found.tried]}
    torch.save(seen, folder / "ceiling.pt")
    write_json(folder / "ceiling.json", tried)
    progress(1)


@torch.no_grad()
def examine_motion(
    folder: Path,
    progress: Progress,
    *,
    play: list[Path],
    lam: Path,
    ceiling: Path,
    distractors: bool,
    seed: int,
    split: str = HELDOUT_PLAY,
    every: int = 1,
) -> None:
    """Measure one latent action model on held-out play. A job.

    Args:
        folder: gets `motion.json`, {target: the fields of :class:`~lara_adapter.lam.health.motion.Motion`}.
        progress: called once.
        play: recordings.
        lam: the model.
        ceiling: folder of :func:`find_ceiling`.
        distractors: whether frames have distractors.
        seed: of the run.
        split: see :func:`load_pairs`.
        every: likewise.
    """
    pairs = load_pairs(play, distractors=distractors, seed=seed, split=split, every=every)
    model = LatentActionModel.from_pretrained(lam).eval()
    parts = list(zip(pairs.now.split(128), pairs.later.split(128)))
    moved, still = (
        torch.cat([model.encode(now, later if moving else now).continuous.flatten(1) for now, later in parts])
        for moving in (True, False)
    )
    supervised = torch.load(ceiling / "ceiling.pt", weights_only=True)
    measured = {}
    for name, target in pairs.targets.items():
        found = measure_motion(moved, still, target, pairs.episode, known=pairs.known, supervised=supervised)
        measured[name] = {
            key: value._asdict() if hasattr(value, "_asdict") else value for key, value in found._asdict().items()
        }
    write_json(folder / "motion.json", measured)
    progress(1)
