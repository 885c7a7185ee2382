"""Measure latent actions: a linear probe for the true action, health of the codes, and where the model looks.

Actions are used here to *measure* latent action models, never to train them. R2 does not separate motion from position:
an expert's action follows from the present frame, so a latent that only encodes where the hand is scores high as well.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples import metaworld_sim
from examples.demo.data import HORIZON, Table, distractor_seeds, load_table
from examples.demo.stages import Progress
from lara_adapter import LatentActionModel
from lara_adapter.storage.files import write_json


@dataclasses.dataclass(frozen=True)
class Probe:
    """How much of the action a linear map reads from a latent.

    Attributes:
        r2: share of the variance of the held-out actions that the latent explains.
        errors: [E] squared error of each held-out demonstration.
        variances: [E] squared deviation from the mean of each, so that r2 = 1 - errors.sum() / variances.sum().
        penalty: the ridge penalty, chosen by cross-validation over training demonstrations.
    """

    r2: float
    errors: Tensor
    variances: Tensor
    penalty: float


def ridge_probe(train: tuple[Tensor, Tensor, Tensor], test: tuple[Tensor, Tensor, Tensor], *, folds: int = 5) -> Probe:
    """Fit a ridge regression from latents to actions on some demonstrations and test it on others.

    Args:
        train: latents [N, D], actions [N, A], demonstration of each row [N].
        test: the same for the held-out demonstrations.
        folds: of the cross-validation that chooses the penalty; no demonstration is split.

    Returns:
        The result.
    """
    (x, y, group), (test_x, test_y, test_group) = (tuple(t.double() for t in part) for part in (train, test))
    penalties = [10.0**power for power in range(-4, 5)]
    names = group.unique()
    losses = torch.zeros(len(penalties), dtype=torch.double)
    for fold in range(folds):
        left_out = torch.isin(group, names[fold::folds])
        if left_out.any() and not left_out.all():
            predictions = ridge(x[~left_out], y[~left_out], x[left_out], penalties)
            losses += torch.stack([(p - y[left_out]).square().sum() for p in predictions])
    best = int(losses.argmin())
    (prediction,) = ridge(x, y, test_x, [penalties[best]])
    error = (prediction - test_y).square().sum(1)
    variance = (test_y - test_y.mean(0)).square().sum(1)
    which = torch.searchsorted(test_group.unique(), test_group)
    errors, variances = (torch.zeros(int(which.max()) + 1).double().index_add(0, which, v) for v in (error, variance))
    return Probe(float(1 - errors.sum() / variances.sum()), errors, variances, penalties[best])


def ridge(x: Tensor, y: Tensor, new_x: Tensor, penalties: list[float]) -> list[Tensor]:
    """Predict y at `new_x` by a ridge regression on standardised x, for each penalty."""
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x, new_x, middle = (x - mean) / scale, (new_x - mean) / scale, y.mean(0)
    value, vector = torch.linalg.eigh(x.T @ x)
    target = vector.T @ (x.T @ (y - middle))
    return [new_x @ (vector @ (target / (value.clamp_min(0) + penalty)[:, None])) + middle for penalty in penalties]


def r2_interval(probe: Probe, other: Probe | None = None, draws: int = 2000) -> tuple[float, float]:
    """Bootstrap over held-out demonstrations: a 95 % interval of R^2, or of its difference to another probe.

    It covers the choice of held-out demonstrations, not the variation over seeds.

    Args:
        probe: a result.
        other: a result on the same demonstrations.
        draws: number of resamplings.

    Returns:
        The 2.5 and 97.5 percentiles.
    """
    random = torch.Generator().manual_seed(0)
    pick = torch.randint(len(probe.errors), (draws, len(probe.errors)), generator=random)
    value = 1 - probe.errors[pick].sum(1) / probe.variances[pick].sum(1)
    if other is not None:
        value = value - (1 - other.errors[pick].sum(1) / other.variances[pick].sum(1))
    low, high = value.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


@torch.no_grad()
def examine_lam(
    folder: Path,
    progress: Progress,
    *,
    data: list[Path],
    lam: Path,
    shown: int,
    distractors: bool,
    seed: int,
    gap: int = HORIZON,
) -> None:
    """Measure one latent action model on held-out demonstrations. A job.

    Args:
        folder: gets `measured.json`, `probe.pt` (for :func:`r2_interval`) and `pictures.pt`.
        progress: called once.
        data: recordings.
        lam: the model.
        shown: number of pairs of frames kept for the pictures.
        distractors: whether frames have distractors.
        seed: of the run.
        gap: C, steps between the frames of a pair. The probe's target stays the movement of the whole chunk, in the
            rows that have both the pair and the frame a chunk later, so that gaps can be compared.
    """
    model = LatentActionModel.from_pretrained(lam).eval()
    world = {"distractors": distractors, "seed": seed}
    train, test = (load_table(data, split, **world, gap=gap) for split in ("demos", "heldout"))
    if gap < HORIZON:
        for split, table in (("demos", train), ("heldout", test)):
            table["valid"] &= load_table(data, split, **world)["valid"]
    fitted, held_out = latents(model, train), latents(model, test)
    probe = ridge_probe(fitted, held_out)
    floor = ridge_probe(_task_only(train, fitted, len(data)), _task_only(test, held_out, len(data)))
    rows = test["valid"].nonzero().squeeze(1)
    now, future = test["image"][rows], test["image"][test["future"][rows]]
    pairs = list(zip(now.split(128), future.split(128)))
    health = model.health(pairs)
    looked = torch.cat([_attention(model, *pair) for pair in pairs])
    squares, moved = (_patches(mask, looked.shape[-1]) for mask in _masks(test, rows, distractors, seed))
    write_json(
        folder / "measured.json",
        {
            "r2": probe.r2,
            "r2_interval": list(r2_interval(probe)),
            "r2_task_only": floor.r2,
            "ridge_penalty": probe.penalty,
            "reconstruction_over_copy": health.ratio,
            "codes_used": health.codes_used,
            "perplexity": health.perplexity,
            "mean_direction": health.mean_direction,
            "attention_on_squares": _over_uniform(looked, squares),
            "attention_on_motion": _over_uniform(looked, moved),
        },
    )
    torch.save(dataclasses.asdict(probe), folder / "probe.pt")
    some = rows[torch.linspace(0, len(rows) - 1, shown + 2)[1:-1].long()]
    a, b = test["image"][some], test["image"][test["future"][some]]
    pictures = {"now": a, "future": b, "predicted": model(a, b).reconstruction.clamp(0, 1)}
    torch.save({**pictures, "attention": _attention(model, a, b)}, folder / "pictures.pt")
    progress(1)


@torch.no_grad()
def latents(model: LatentActionModel, table: Table, *, still: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents [N, D] of all pairs, the mean movement in their 16 steps [N, 3], and their episodes [N].

    With `still` the latents are those of (I_t, I_t), in which nothing moves.
    """
    rows = table["valid"].nonzero().squeeze(1)
    encoded = [
        model.encode(table["image"][part], table["image"][part if still else table["future"][part]]).continuous.flatten(
            1
        )
        for part in rows.split(128)
    ]
    # without the gripper: its command is constant within a task, so it would only measure task recognition
    return torch.cat(encoded), table["action"][rows, :, :3].mean(1), table["episode"][rows]


def _task_only(table: Table, latents: tuple[Tensor, Tensor, Tensor], tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the latents by the task, one-hot: the baseline of the probe."""
    return torch.nn.functional.one_hot(table["task"][table["valid"]], tasks).float(), *latents[1:]


def _attention(model: LatentActionModel, now: Tensor, future: Tensor) -> Tensor:
    """Return the attention averaged over layers, heads and queries: [B, 2, h, w], summing to 1."""
    mean = model.attention(now, future).mean(dim=(1, 2, 3))
    return mean / mean.sum((1, 2, 3), keepdim=True)


def _masks(table: Table, rows: Tensor, distractors: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return masks of the distractor squares and of what moves in the clean scene: [N, 2, H, W] float each."""
    pairs = torch.stack([rows, table["future"][rows]], 1)
    size = table["clean"].shape[-1]
    if distractors:
        seeds = distractor_seeds("heldout", seed, len(table["valid"]))
        masks = np.stack([metaworld_sim.Distractors.draw(int(seeds[row]), size).mask(size) for row in pairs.flatten()])
        squares = torch.from_numpy(masks).view(len(rows), 2, size, size).float()
    else:
        squares = torch.zeros(len(rows), 2, size, size)
    first, second = table["clean"][pairs].float().unbind(1)
    moved = ((first - second).abs().amax(1) > 24).float()
    return squares, torch.stack([moved, moved], 1)


def _patches(mask: Tensor, grid: int) -> Tensor:
    """Return the covered share of each patch: [N, 2, H, W] -> [N, 2, grid, grid]."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, grid)


def _over_uniform(attention: Tensor, share: Tensor) -> float:
    """Attention on the marked patches over that of uniform attention."""
    return float((attention * share).sum((1, 2, 3)).mean() / share.mean((1, 2, 3)).mean().clamp_min(1e-9))
