"""The picture of the results: bars with intervals, a row of panels for each world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from examples.refine_lam.results import LAMS, REFERENCES, WORLDS
from examples.refine_lam.statistics import interval_of_mean, over_demonstrations, values_of
from lara_adapter.evaluation import wilson_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.demo.pictures import STYLE

Rows = Sequence[Mapping[str, Any]]

# as in the demo's pictures; the references are grey
COLOURS = {"plain": "#999999", "control": "#CC79A7", "cosine": "#E69F00", "contrastive": "#009E73"}
PANELS = (
    ("probe", "r2", "linear probe: R2"),
    ("information", "held_out", "bits per code"),
    ("moto_gpt_error", "action_error", "Moto-GPT: action error"),
    ("moto_gpt", "success", "Moto-GPT: success"),
    ("pseudo_labels", "r2", "decoded actions: R2"),
    ("pseudo_policy_error", "action_error", "on labels: action error"),
    ("pseudo_policy", "success", "on labels: success"),
)


def draw(file: Path, rows: Rows) -> None:
    """Draw bars: means over seeds, each seed as a dot.

    Lines at the bars are 95 % intervals: t over seeds, or with one seed over demonstrations; Wilson's over all episodes
    for success rates. A measure without rows has no panel.

    Args:
        file: where to save the picture.
        rows: of results.json.
    """
    panels = [panel for panel in PANELS if any(row["measure"] == panel[0] for row in rows)]
    worlds = [world for world in WORLDS if any(row["world"] == world for row in rows)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(worlds),
            len(panels),
            figsize=(3 * len(panels), 3.1 * len(worlds) + 0.5),
            squeeze=False,
            constrained_layout=True,
        )
        for line, world in zip(axes, worlds):
            own = [row for row in rows if row["world"] == world]
            for axis, (measure, key, title) in zip(line, panels):
                _bars(axis, own, measure, key)
                axis.set_title(title)
            line[0].set_ylabel(WORLDS[world].lower())
        figure.savefig(file)
        plt.close(figure)


def _bars(axis: Any, rows: Rows, measure: str, key: str) -> None:
    names = {**LAMS, **REFERENCES}
    arms = [arm for arm in names if values_of(rows, arm, measure, key)]
    lows = [0.0]
    highs = [0.0]
    for place, arm in enumerate(arms):
        values = list(values_of(rows, arm, measure, key).values())
        mean = sum(values) / len(values)
        low, high = interval_of_mean(values) if len(values) > 1 else over_demonstrations(rows, arm, measure)
        if key == "success":
            mine = [row for row in rows if (row["arm"], row["measure"]) == (arm, measure)]
            solved = [value for row in mine for outcomes in row["solved"].values() for value in outcomes]
            low, high = wilson_interval(sum(solved), len(solved))
        axis.bar(place, mean, color=COLOURS.get(arm, "#DDDDDD"), width=0.75)
        if low is not None:
            axis.vlines(place, low, high, color="black", lw=1.2)
            highs.append(high if key == "success" else min(high, 1.6 * max(values)))
            lows.append(max(low, min(values) - 0.3 * abs(max(values))))
        offsets = [place + 0.16 + 0.06 * number for number in range(len(values))]
        axis.plot(offsets, values, "o", ms=2.6, color="#444444")
        highs.append(max(values))
        lows.append(min(values))
    axis.set_ylim(min(lows) * 1.05, max(highs) * 1.05 or 1)
    axis.axhline(0, color="black", lw=0.6)
    axis.set_xticks(range(len(arms)), [names[arm].split(":")[0].replace(", ", ",\n") for arm in arms], rotation=50)
    axis.tick_params(axis="x", labelsize=7.5)
    for text in axis.get_xticklabels():
        text.set_ha("right")
        text.set_rotation_mode("anchor")
