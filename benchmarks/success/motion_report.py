"""Tables of the motion that latent action models hold: rows of benchmarks.success.motion and of its twin for LIBERO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks import markdown
from benchmarks.success import report
from benchmarks.success.arms import CONTROL
from benchmarks.success.rows import Row, read_rows


def recorded(path: Path, regime: str) -> report.Rows:
    """The rows of a regime, by seed and arm."""
    return by_arm(read_rows(path), regime)


def by_arm(rows: list[Row], regime: str) -> report.Rows:
    """Those of a regime, by seed and arm."""
    return {(row["seed"], row["arm"]): row for row in rows if row["regime"] == regime}


def number(key: str) -> Callable[[Row], float]:
    """Reads one number about the displacement, of :class:`~lara_adapter.lam.health.motion.Motion`, from a row."""
    return lambda row: float(row["motion"]["displacement"][key]["value"])


def over(rows: report.Rows, arm: str, base: str, key: str) -> str:
    """What an arm adds to another, paired over seeds."""
    return report.gain(report.compare(rows, arm, base, number(key)), 1, 2)


def over_control(rows: report.Rows, arm: str, key: str) -> str:
    """What an arm adds to as many steps without alignment."""
    return over(rows, arm, CONTROL, key)


def average(rows: report.Rows, arm: str, key: str) -> float:
    """The mean over seeds."""
    return mean(number(key)(row) for (_, name), row in rows.items() if name == arm)


def table(rows: report.Rows) -> str:
    """A row for each arm: means over seeds, and what it adds to as many steps without alignment."""
    lines = []
    for arm in (name for name in report.ORDER if name in {name for _, name in rows}):
        mean_of = {key: f"{average(rows, arm, key):.2f}" for key in ("pair", "still", "beyond", "ceiling_beyond")}
        added = ["" if arm in ("before", CONTROL) else over_control(rows, arm, key) for key in ("pair", "beyond")]
        seeds = str(sum(name == arm for _, name in rows))
        seen = f"{mean_of['beyond']} of {mean_of['ceiling_beyond']}"
        lines.append([arm, seeds, mean_of["pair"], mean_of["still"], added[0], seen, added[1]])
    gained = "over control (t, 95 %)"
    head = ["arm", "seeds", "R2 of the displacement, z alone", "of a still pair", gained]
    head += ["beyond the present, of what can be seen", gained]
    return markdown.table(head, lines)
