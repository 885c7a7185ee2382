"""Is a latent action model any good on this data? Measures at several frame gaps, thresholds, and what to do about it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from ...data import open_dataset
from ...data.gap import parse_gap
from ...errors import DatasetError, LaraArgumentError
from ..identity import learnt_from, open_model, warn_of_gap
from ..measure import STILL
from ..model import LatentActionModel
from ..processes import open_processes
from .actions import examine_actions, judge_actions
from .sample import Sample, describe_not_finite, iter_pairs, sample_episodes
from .verdicts import Finding, GapHealth, HealthReport, Thresholds, judge

__all__ = ["examine"]


def examine(
    lam: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    gap: str | int | None = None,
    gaps: Sequence[str | int] = (),
    camera: str | None = None,
    pairs: int = 256,
    batch_size: int = 32,
    device: str = "auto",
    thresholds: Thresholds | None = None,
    revision: str | None = None,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
    picture_fps: float | None = None,
    ceiling: bool = False,
) -> HealthReport:
    """Measure a latent action model on pairs spread evenly over a dataset or videos, and judge it.

    Under `accelerate launch` every process calls this: they share the decoding, the first one measures, and all have the
    report, which is that of one process.

    The sampled frames are held in memory at the model's size: 0.15 MB each at 224 pixels, one per pair and gap.

    Args:
        lam: folder or Hub id of a latent action model.
        data: dataset (folder, file, or Hub id of one in the LeRobot format), folder of videos, or one video.
        gap: the frame gap to judge, in frames ("16") or seconds ("0.5s"). None: the one of `gaps` at which the model
            reconstructs best against copying.
        gaps: the gaps to measure as well; none: a quarter, half, twice and four times `gap`, or 1, 2, 4, ..., 32.
        camera: key of the dataset's camera; None: the only one.
        pairs: about how many pairs of frames per gap.
        batch_size: pairs at once.
        device: "auto", "cpu", "cuda" or "cuda:1".
        thresholds: where health ends; None: the defaults.
        revision: commit, tag or branch of the model on the Hub.
        episodes: numbers of the episodes to look at, as "7" or "0:50"; none: all.
        skip: numbers of those to leave out.
        picture_fps: frames per second of pictures; None: what the format states, else 30 for folders and 10 for others.
        ceiling: how much motion can be seen at all is found by regressions; also train networks for it, which see more if
            there are thousands of pairs, in minutes.

    Raises:
        DatasetError: there is nothing that can be read, or no clip is long enough for any gap.
        AdapterFormatError: the model is missing or damaged.
        LaraArgumentError: an argument out of range.
    """
    if pairs < 2 or batch_size < 1:
        raise LaraArgumentError(
            f"pairs={pairs} and batch_size={batch_size}, but pairs >= 2 and batch_size >= 1 are expected"
        )
    source = open_dataset(data, picture_fps=picture_fps, episodes=episodes, skip=skip)
    view = source.camera(camera)
    named = None if gap is None else parse_gap(gap).in_frames(source.fps)
    ladder = _ladder(named, gaps, source.fps)
    model, identity = open_model(lam, revision)
    if named is not None:
        warn_of_gap(model, named, source.fps)
    with open_processes(device) as processes:
        samples = sample_episodes(source, view, ladder, pairs, model.config.image_size, processes)
        lengths = [episode.length for episode in source.episodes]

        def report() -> HealthReport:
            model.to(processes.device)
            found = [_measure(model, samples, lengths, each, batch_size) for each in ladder]
            measured = [each for each in found if each.measured is not None]
            if not measured or (named is not None and found[ladder.index(named)].measured is None):
                raise DatasetError(
                    f"{source.name}: no clip is longer than the frame gap of {named or ladder[0]}; the longest has "
                    f"{max(lengths)} frames"
                )
            judged = named or min(measured, key=lambda each: _ratio(each)).gap
            limits = thresholds or Thresholds()
            findings = judge(found, judged, identity["codebook_size"], limits)
            known = examine_actions(model, samples, judged, batch_size, ceiling)
            findings += judge_actions(known, limits)
            if missing := describe_not_finite(samples):
                text = f"NaN or infinite values, which are left out of probe and motion: {missing}"
                findings.append(Finding("actions", "note", text))
            if learnt_from(model, source):
                text = (
                    "the LAM learnt from these very actions, so probe and motion flatter it: measure on other episodes"
                )
                findings.append(Finding("labels", "note", text))
            return HealthReport(
                lam=identity, data=source.name, camera=view or None, clips=len(samples), skipped=len(source.left_out),
                fps=source.fps, gaps=found, judged=judged, chosen=named is not None, probes=known.probes,
                motion=known.motion, findings=findings,
            )  # fmt: skip

        return processes.first(report)


def _ratio(found: GapHealth) -> float:
    """Reconstruction over copy, to choose a gap by; infinite where next to nothing moves."""
    value = math.nan if found.measured is None else found.measured.ratio
    return math.inf if math.isnan(value) or found.still > 0.9 else value


def _ladder(gap: int | None, gaps: Sequence[str | int], fps: float) -> list[int]:
    if gaps:
        ladder = {parse_gap(each).in_frames(fps) for each in gaps}
    else:
        ladder = {1, 2, 4, 8, 16, 32} if gap is None else {max(1, gap // 4), max(1, gap // 2), 2 * gap, 4 * gap}
    return sorted(ladder | ({gap} if gap else set()))


@torch.no_grad()
def _measure(
    model: LatentActionModel, samples: list[Sample], lengths: list[int], gap: int, batch_size: int
) -> GapHealth:
    lost = 1 - sum(max(0, length - gap) for length in lengths) / max(1, sum(lengths))
    errors = [
        ((now.float() - later.float()) / 255).square().mean(dim=(1, 2, 3))
        for now, later in iter_pairs(samples, gap, batch_size)
    ]
    if not errors:
        return GapHealth(gap, None, math.nan, lost)
    still = float((torch.cat(errors) < STILL).float().mean())
    return GapHealth(gap, model.health(iter_pairs(samples, gap, batch_size)), still, lost)
