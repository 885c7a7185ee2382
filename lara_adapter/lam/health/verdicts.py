"""The verdicts of a health report, and the report in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..measure import LatentHealth
from .motion import Motion
from .probe import ProbeResult

__all__ = ["Finding", "GapHealth", "HealthReport", "Thresholds", "describe", "judge"]

_COLLAPSE = (
    "collapse: {}. In pre-training: normalize_latent, vq_warmup_steps, vq_revive_every; in joint training: "
    "alignment='contrastive', or a smaller lam_grad_scale"
)


class Thresholds(NamedTuple):
    """Where health ends: the one owner of these numbers.

    ratio: reconstruction error over that of copying the present frame, at most. At 1 nothing was learnt.
    mean_direction: at most. A LAM trained on video alone had 0.92 in this library's demo and was usable; one that the
        cosine alignment had collapsed 0.99.
    latent_std: at least; below it z is one and the same.
    perplexity_share: perplexity over codebook size, at least; collapsed ones use a handful of codes of 128.
    still: share of pairs in which next to nothing moves, at most.
    lost: share of frames whose partner lies past the end of the clip, at most.
    probe: R^2 from z to the action, at least; below it a note, no failure: a LAM may see other things.
    motion: R^2 of z beyond the present frame, at least; below it a note, since the motion may not be visible at all.
    share: of the ceiling that z reaches beyond the present frame, at least: it fails where the whole interval is below.
    seen: R^2 of the present frame, state and task for the target, at most. Above it actions follow from what is seen, as an
        expert's do (0.92 in this library's demo; 0.12 in its play), and motion is not judged.
    """

    ratio: float = 0.95
    mean_direction: float = 0.97
    latent_std: float = 1e-3
    perplexity_share: float = 0.04
    still: float = 0.5
    lost: float = 0.5
    probe: float = 0.05
    motion: float = 0.05
    share: float = 0.25
    seen: float = 0.6


class GapHealth(NamedTuple):
    """One frame gap."""

    gap: int  # C in frames
    measured: LatentHealth | None  # see :class:`LatentHealth`; None where no clip is long enough
    still: float  # share of pairs whose copy error is below what counts as still
    lost: float  # share of frames without a partner C frames later


class Finding(NamedTuple):
    """One verdict."""

    name: str  # what was judged
    state: str  # "ok", "fail", or "note" (worth knowing, no failure)
    text: str  # the value against its threshold, and the advice where it is not ok


class HealthReport(NamedTuple):
    """What :func:`examine` found; `str` of it is the report in words.

    lam: which model, see :func:`~lara_adapter.lam.identity.open_model`.
    data: its name; `camera` None for videos.
    clips: episodes or videos looked at; `skipped`: damaged ones.
    fps: frames per second.
    gaps: in ascending order.
    judged: the gap that the findings are about; `chosen` whether the caller named it.
    probes: what of the action chunk -> R^2; empty where there are no actions.
    motion: target -> what z says of it beyond the present frame; empty where there are no actions.
    findings: the verdicts.
    """

    lam: dict[str, Any]
    data: str
    camera: str | None
    clips: int
    skipped: int
    fps: float
    gaps: list[GapHealth]
    judged: int
    chosen: bool
    probes: dict[str, ProbeResult]
    motion: dict[str, Motion]
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether no threshold failed."""
        return all(finding.state != "fail" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON-able values; NaN becomes None."""
        plain = _plain({"ok": self.ok, **self._asdict()})
        assert isinstance(plain, dict)
        return plain

    def __str__(self) -> str:
        return describe(self)


def judge(
    gaps: Sequence[GapHealth],
    judged: int,
    codebook_size: int,
    limits: Thresholds,
) -> list[Finding]:
    """The findings about one gap."""
    health = next(gap for gap in gaps if gap.gap == judged)
    found = health.measured
    assert found is not None
    copies = not found.ratio <= limits.ratio  # NaN too
    better = [
        gap.gap for gap in gaps if gap.measured and gap.measured.ratio <= limits.ratio and gap.still <= limits.still
    ]
    advice = "the reconstruction is no better than copying: "
    if better:
        advice += f"at a frame gap of {_nearest(better, judged)} it is; "
    advice += "train longer, on data like these, with this gap"
    if health.still > limits.still:
        advice = "the reconstruction is no better than copying, because next to nothing moves: see the frame gap"
    least = max(2.0, limits.perplexity_share * codebook_size)
    moving = [gap.gap for gap in gaps if gap.measured and gap.still <= limits.still and gap.gap > judged]
    larger = f"{moving[0]} moves enough" if moving else "no gap measured moves enough; cut the still stretches"
    verdicts = [  # name, whether ok, value against threshold, advice
        ("reconstruction", not copies, f"{_number(found.ratio)} of copying, at most {limits.ratio:g}", advice),
        (
            "codes",
            found.perplexity >= least,
            f"perplexity {found.perplexity:.1f} of {codebook_size} codes ({found.codes_used} used), at least {least:.1f}",
            _COLLAPSE.format("a handful of codes stands for everything"),
        ),
        (
            "latent",
            found.latent_std >= limits.latent_std,
            f"standard deviation {found.latent_std:.3g}, at least {limits.latent_std:g}",
            _COLLAPSE.format("the latent is the same for every pair"),
        ),
        (
            "direction",
            found.mean_direction <= limits.mean_direction,
            f"mean direction {found.mean_direction:.2f} (1: constant), at most {limits.mean_direction:g}",
            _COLLAPSE.format("the latent points the same way whatever happens"),
        ),
        (
            "frame gap",
            health.still <= limits.still,
            f"{health.still:.0%} of pairs next to still, at most {limits.still:.0%}",
            f"frame gap {judged} is too small for these data, or they are mostly still: {larger}",
        ),
        (
            "partners",
            health.lost <= limits.lost,
            f"{health.lost:.0%} of frames have none {judged} frames later, at most {limits.lost:.0%}",
            f"frame gap {judged} is too large for clips this short: take a smaller one",
        ),
    ]
    findings = [
        Finding(name, "ok" if good else "fail", value if good else f"{value}. {advice}")
        for name, good, value, advice in verdicts
    ]
    small = [gap.gap for gap in gaps if gap.gap < judged and gap.measured and gap.still > limits.still]
    if small:
        text = f"frame gaps up to {small[-1]} are too small: most pairs next to still"
        findings.append(Finding("smaller gaps", "note", text))
    large = [gap.gap for gap in gaps if gap.gap > judged and _too_large(gap, limits)]
    if large and not copies:
        text = f"frame gaps from {large[0]} on are too large for this model: no better than copying there"
        findings.append(Finding("larger gaps", "note", text))
    return findings


def describe(report: HealthReport) -> str:
    """The report in words."""
    lam = report.lam
    shape = " x ".join(map(str, lam["latent_shape"]))
    where = f", {report.camera}" if report.camera else ""
    skipped = f" ({report.skipped} damaged ones left out)" if report.skipped else ""
    lines = [
        f"LAM    {lam['source']} ({lam['revision'] or 'weights ' + lam['weights_sha256'][:12]}), latent {shape}, "
        f"{lam['codebook_size']} codes",
        f"data   {report.data}{where}: {report.clips} clips{skipped}, {report.fps:g} frames per second",
        "",
        "frame gap        pairs  recon / copy  copy error  codes  perplexity  latent std  mean dir.  still  no partner",
    ]
    for gap in report.gaps:
        name = f"{gap.gap} ({gap.gap / report.fps:.2f} s)" + (" *" if gap.gap == report.judged else "")
        found = gap.measured
        if found is None:
            lines.append(f"{name:<16} no clip is long enough")
            continue
        lines.append(
            f"{name:<16} {found.pairs:>5}  {_number(found.ratio):>12}  {found.copy_loss:>10.2g}  {found.codes_used:>5}  "
            f"{found.perplexity:>10.1f}  {found.latent_std:>10.2g}  {found.mean_direction:>9.2f}  {gap.still:>5.0%}  "
            f"{gap.lost:>10.0%}"
        )
    how = "as asked" if report.chosen else "where it reconstructs best against copying; --gap names another"
    lines += [f"* judged, {how}", ""]
    lines += [
        f"{finding.state.upper() if finding.state == 'fail' else finding.state:<5}{finding.name:<15} {finding.text}"
        for finding in report.findings
    ]
    lines += ["", "healthy" if report.ok else "NOT healthy"]
    return "\n".join(lines)


def _too_large(gap: GapHealth, limits: Thresholds) -> bool:
    return gap.measured is not None and gap.still <= limits.still and gap.measured.ratio > limits.ratio


def _nearest(gaps: list[int], gap: int) -> int:
    return min(gaps, key=lambda other: abs(math.log(other / gap)))


def _number(value: float) -> str:
    return "none moves" if math.isnan(value) else f"{value:.2f}"


def _plain(content: object) -> object:
    if isinstance(content, tuple) and hasattr(content, "_asdict"):
        content = content._asdict()
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
