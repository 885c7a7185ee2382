"""What latent actions say about the true actions and displacements of a dataset, and the verdicts on it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import LaraArgumentError
from ..model import LatentActionModel
from .ceiling import train_ceiling
from .kernel import fit_kernels
from .motion import Motion, measure_motion
from .probe import ProbeResult, cross_validated_r2
from .sample import Sample, iter_pairs
from .verdicts import Finding, Thresholds

__all__ = ["ActionHealth", "examine_actions", "judge_actions"]


class ActionHealth(NamedTuple):
    """Measures by target, and why there are none, where there are none."""

    probes: dict[str, ProbeResult]
    no_probe: str
    motion: dict[str, Motion]
    no_motion: str


def examine_actions(
    model: LatentActionModel, samples: list[Sample], gap: int, batch_size: int, ceiling: bool
) -> ActionHealth:
    """R^2 from z to the mean and to the change of the actions of the gap; motion, for the displacement and the action."""
    if samples[0].actions is None:
        reason = "the data has no numeric column 'action'"
        return ActionHealth({}, reason, {}, reason)
    pair, still = _encode(model, samples, gap, batch_size)
    places = [(s, t) for s in samples for t in s.places if t in s.frames and t + gap in s.frames]
    chunks = [s.actions[t : t + gap + 1] for s, t in places if s.actions is not None]
    usable = torch.tensor([bool(np.isfinite(chunk).all()) for chunk in chunks])
    if not usable.any():
        return ActionHealth({}, "no pair has finite actions", {}, "no pair has finite actions")
    number = torch.tensor([s.number for s, _ in places])
    mean = _tensor([chunk[:-1].mean(0) for chunk in chunks])
    change = _tensor([chunk[-1] - chunk[0] for chunk in chunks])
    probes: dict[str, ProbeResult] = {}
    reasons = {"probe": "", "motion": ""}
    for name, target in {"mean": mean, "change": change}.items():
        try:
            probes[name] = cross_validated_r2(pair[usable], target[usable], number[usable])
        except LaraArgumentError as error:
            reasons["probe"] = str(error)
    try:
        motion = _measure_motion(model, samples, places, pair, still, mean, number, usable, gap, batch_size, ceiling)
    except LaraArgumentError as error:
        motion, reasons["motion"] = {}, str(error)
    return ActionHealth(probes, reasons["probe"], motion, reasons["motion"])


def _measure_motion(
    model: LatentActionModel,
    samples: list[Sample],
    places: list[tuple[Sample, int]],
    pair: Tensor,
    still: Tensor,
    action: Tensor,
    number: Tensor,
    usable: Tensor,
    gap: int,
    batch_size: int,
    ceiling: bool,
) -> dict[str, Motion]:
    """By target: the displacement, where states are known, and the action; beside what can be seen."""
    states, after = _states(places, 0), _states(places, gap)
    known = _known(places, states)
    targets = {"action": action}
    if states is not None and after is not None:
        targets = {"displacement": after - states, **targets}
    labels = torch.cat(list(targets.values()), 1)
    usable = usable & labels.isfinite().all(1)
    now, later = (torch.cat(list(frames))[usable] for frames in zip(*iter_pairs(samples, gap, batch_size)))
    episode = number[usable]
    states = None if states is None else states[usable]
    supervised = fit_kernels(now, later, labels[usable], episode, states=states)
    if ceiling:
        device = next(model.parameters()).device
        trained = train_ceiling(now, later, labels[usable], episode, states=states, device=device)
        supervised = torch.cat([supervised, trained.prediction.double()], 1)
    known = None if known is None else known[usable]
    return {
        name: measure_motion(pair[usable], still[usable], target[usable], episode, known=known, supervised=supervised)
        for name, target in targets.items()
    }


def judge_actions(health: ActionHealth, limits: Thresholds) -> list[Finding]:
    """The findings about probe and motion."""
    return [_judge_probe(health, limits), *_judge_motion(health, limits)]


def _judge_probe(health: ActionHealth, limits: Thresholds) -> Finding:
    if not health.probes:
        return Finding("probe", "note", f"not made: {health.no_probe}")
    values = ", ".join(f"{name} {probe.r2:.2f}" for name, probe in health.probes.items())
    first = next(iter(health.probes.values()))
    size = f"{first.rows} pairs, {first.episodes} episodes, {first.folds} folds"
    text = f"R2 from z to the actions of the gap: {values} ({size})"
    if max(probe.r2 for probe in health.probes.values()) >= limits.probe:
        return Finding("probe", "ok", text)
    return Finding("probe", "note", f"{text}. The latent says nothing linear about the actions")


def _judge_motion(health: ActionHealth, limits: Thresholds) -> list[Finding]:
    if not health.motion:
        return [Finding("motion", "note", f"not made: {health.no_motion}")]
    return [Finding("motion", *_judge_target(name, motion, limits)) for name, motion in health.motion.items()]


def _judge_target(name: str, motion: Motion, limits: Thresholds) -> tuple[str, str]:
    """State and text of one target."""
    text = (
        f"{name}: R2 of z beyond the present frame {motion.beyond}, at least {limits.motion:g}; z alone "
        f"{motion.pair.value:.2f}, a still pair {motion.still.value:.2f}, all of the present {motion.present.value:.2f}"
    )
    if motion.ceiling_beyond is not None:
        text += f"; ceiling beyond the present {motion.ceiling_beyond.value:.2f}"
        text += ", nothing to take a share of" if motion.share_beyond is None else f", share {motion.share_beyond}"
    if motion.present.value > limits.seen:
        return "note", (
            f"{text}. The target follows from what is seen, as an expert's actions do, so this says little: measure on "
            "play (random actions)"
        )
    if motion.share_beyond is not None and motion.share_beyond.value > 1.2:
        text += ". z says more than regressions on the pixels: they had too few pairs, give more --pairs"
    if motion.share_beyond is not None and motion.share_beyond.high < limits.share:
        return "fail", (
            f"{text}, at least {limits.share:g}. The motion can be seen, but z does not hold it: train longer, on larger "
            "gaps, on video without distractors, or with a few demonstrations (lara train-lam --actions)"
        )
    if motion.beyond.value < limits.motion:
        return "note", f"{text}. z says next to nothing about the motion; try a larger gap"
    return "ok", text


@torch.no_grad()
def _encode(model: LatentActionModel, samples: list[Sample], gap: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """z of each pair, and of its present frame twice: [R, N * D] float32 each."""
    device, pair, still = next(model.parameters()).device, [], []
    for now, later in iter_pairs(samples, gap, batch_size):
        now = now.to(device)
        pair.append(model.encode(now, later.to(device)).continuous.flatten(1).cpu())
        still.append(model.encode(now, now).continuous.flatten(1).cpu())
    return torch.cat(pair), torch.cat(still)


def _states(places: list[tuple[Sample, int]], gap: int) -> Tensor | None:
    """The states `gap` frames later: [R, K]; None where a state is missing."""
    if any(s.states is None for s, _ in places):
        return None
    return _tensor([s.states[t + gap] for s, t in places if s.states is not None])


def _known(places: list[tuple[Sample, int]], states: Tensor | None) -> Tensor | None:
    """State and task, one-hot, of the present frame: [R, K]; None where neither is known."""
    parts = [] if states is None else [states]
    if all(s.tasks is not None for s, _ in places):
        _, which = torch.tensor([int(s.tasks[t]) for s, t in places if s.tasks is not None]).unique(return_inverse=True)
        if which.max() > 0:
            parts.append(torch.nn.functional.one_hot(which).double())
    return torch.cat(parts, 1) if parts else None


def _tensor(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.float64))
