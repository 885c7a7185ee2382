"""Pictures of the success rows."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.success.arms import BASE, CONTROL, DEFAULTS

Summaries = dict[str, dict[str, dict[str, Any]]]


def gains(groups: Summaries, arms: tuple[str, ...], path: Path) -> None:
    """Draw what each arm gains in success over DiT-only, and its LAM in the probe over the control, with t intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [2.4 + sum("success_gain" in summary.get(arm, {}) for arm in arms) for summary in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(11, 0.6 + 0.33 * sum(heights)), squeeze=False, sharex="col",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for row, (name, summary) in zip(axes, groups.items()):
        for axis, key, scale, title in (
            (row[0], "success_gain", 100, "success over DiT-only, points"),
            (row[1], "probe_gain", 1, "probe R2 over the control LAM"),
        ):
            shown = [arm for arm in arms if summary.get(arm, {}).get(key)]
            if not shown:
                axis.set_axis_off()
                continue
            axis.set_ylim(-0.6, len(shown) - 0.4)
            for height, arm in enumerate(reversed(shown)):
                gain = summary[arm][key]
                if gain["t"]:
                    axis.plot([scale * end for end in gain["t"]], [height, height], color="C0", lw=2)
                axis.plot(scale * gain["mean"], height, "o", color="C0")
            axis.set_yticks(range(len(shown)), list(reversed(shown)))
            axis.axvline(0, color="0.6", lw=1)
            seeds = max(summary[arm][key]["seeds"] for arm in shown)
            axis.tick_params(labelbottom=True)  # the last panel of a column may be empty
            axis.set_title(f"{title}\n{textwrap.fill(f'{name}, {seeds} seeds', 66)}", fontsize=9)
    _save(figure, path, digest(groups))


def ablations(points: dict[str, dict[str, dict[str, list[float]]]], references: dict[str, float], path: Path) -> None:
    """Draw one panel for each knob and measure: a dot for each seed, a line through the means.

    Args:
        points: measure -> knob -> value of the knob -> one number for each seed.
        references: measure -> mean over the same seeds of what needs no LARA (policies: DiT-only; LAMs: the control).
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    knobs = [knob for knob in (*DEFAULTS, "cosine, layer") if any(knob in found for found in points.values())]
    figure, axes = plt.subplots(
        len(points), len(knobs), figsize=(0.8 + 2.0 * len(knobs), 0.5 + 2.1 * len(points)), squeeze=False, sharey="row"
    )
    for axis, knob in zip(axes[0], knobs):
        axis.set_title(knob, fontsize=9)
    for row, (measure, found) in zip(axes, points.items()):
        row[0].set_ylabel(measure)
        for axis, knob in zip(row, knobs):
            values = sorted(found.get(knob, {}), key=_order)
            for place, value in enumerate(values):
                axis.plot([place] * len(found[knob][value]), found[knob][value], ".", color="C0", alpha=0.5)
            axis.plot(range(len(values)), [mean(found[knob][value]) for value in values], color="C0")
            default = DEFAULTS.get(knob.removeprefix("cosine, "))
            axis.set_xticks(
                range(len(values)), [f"[{value}]" if value == default else value for value in values], fontsize=7
            )
            if measure in references:
                axis.axhline(references[measure], color="0.6", lw=1, ls="--")
    figure.suptitle(
        f"One thing changed of the arm {BASE!r} (in brackets: as it is there); dashed: DiT-only; for R2 the {CONTROL} LAM",
        fontsize=9,
    )
    _save(figure, path, digest([points, references]))


def digest(data: Any) -> str:
    """Names the numbers that a picture shows; it stands in the file as "Source"."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _save(figure: Any, path: Path, source: str) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Source": source})
    plt.close(figure)


def _order(value: str) -> tuple[float, str]:
    """Sort numbers by size, words after them."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value
