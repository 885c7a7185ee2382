"""The report on a latent action model's health as one HTML page."""

from __future__ import annotations

import math
from pathlib import Path

from ...page import Curves, Part, Table, Text, write_page
from .motion import Estimate, Motion
from .verdicts import HealthReport

__all__ = ["write_health_page"]

_CURVES = {
    "Reconstruction over copying": ("ratio",),
    "Codes": ("perplexity", "codes_used"),
    "Collapse": ("mean_direction", "latent_std"),
}


def write_health_page(report: HealthReport, file: Path) -> Path:
    """Write the page.

    Raises:
        HostNotInstalled: jinja2 is missing.
    """
    parts: list[Part] = [
        Text("Findings", [(finding.state, f"{finding.name}: {finding.text}") for finding in report.findings])
    ]
    found = [(gap.gap, gap.measured) for gap in report.gaps if gap.measured is not None]
    curves = [
        Curves(title, "frame gap", {name: [(gap, float(getattr(each, name))) for gap, each in found] for name in names})
        for title, names in _CURVES.items()
    ]
    curves.append(
        Curves("Pairs", "frame gap", {
            "next to still": [(gap.gap, gap.still) for gap in report.gaps],
            "frames without a partner": [(gap.gap, gap.lost) for gap in report.gaps],
        })
    )  # fmt: skip
    names = tuple(found[0][1]._fields) if found else ()
    rows = [
        [gap, *(f"{value:.4g}" if math.isfinite(value) else "-" for value in map(float, each))] for gap, each in found
    ]
    probes = [[name, *map(_written, probe)] for name, probe in report.probes.items()]
    tables = [Table("Numbers", ("gap", *names), rows)]
    if probes:
        fields = next(iter(report.probes.values()))._fields
        tables.append(Table("Probe", ("of the actions", *fields), probes))
    if report.motion:
        motion = [[name, *map(_written, each)] for name, each in report.motion.items()]
        tables.append(Table("Motion", ("of the", *Motion._fields), motion))
    tables.append(Table("Model", ("what", "value"), list(report.lam.items())))
    summary = (
        f"{'Healthy' if report.ok else 'Not healthy'} at a gap of {report.judged} frames: {report.clips} clips of "
        f"{report.data}, {report.skipped} left out"
    )
    return write_page(file, "Health of a latent action model", summary, [*parts, *curves, *tables])


def _written(value: object) -> object:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        return str(value)
    return f"{value:.3f}" if isinstance(value, float) else value
