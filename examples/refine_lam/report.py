"""Report of the results: tables of values and of differences, a legend, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.demo.tables import aligned, markdown_table, wrapped
from examples.refine_lam.results import LAMS, REFERENCES, RESULTS, WORLDS, ResultsUnusable, Row
from examples.refine_lam.statistics import (
    difference_interval,
    interval_of_mean,
    over_demonstrations,
    paired_bootstrap,
    values_of,
)
from lara_adapter.evaluation import wilson_interval
from lara_adapter.storage.files import read_json

# measure, value, title, digits
COLUMNS = (
    ("probe", "r2", "probe R2", 2),
    ("information", "held_out", "MI, bits", 2),
    ("health", "codes_used", "codes", 0),
    ("health", "mean_direction", "mean dir.", 2),
    ("health", "reconstruction_over_copy", "recon/copy", 2),
    ("moto_gpt_error", "action_error", "Moto-GPT error", 3),
    ("moto_gpt", "success", "Moto-GPT success", 0),
    ("pseudo_labels", "r2", "label R2", 2),
    ("pseudo_policy_error", "action_error", "error on labels", 3),
    ("pseudo_policy", "success", "success on labels", 0),
)


def write(folder: Path, *, markdown: bool = False) -> str:
    """Draw the picture of the results in a folder, and return the tables with a legend, or as Markdown without it.

    Raises:
        ResultsUnusable: the folder has no results.
    """
    file = folder / RESULTS
    if not file.is_file():
        raise ResultsUnusable(f"{file} is missing: run python -m examples.refine_lam --output {folder} first")
    results = read_json(file)
    from examples.refine_lam.pictures import draw  # not at the top: the jobs do not need matplotlib

    draw(folder / "refine_lam.png", results["rows"])
    return as_markdown(results) if markdown else as_text(results)


def as_text(results: Mapping[str, Any]) -> str:
    """Format the results for a terminal."""
    parts = []
    for world, title in WORLDS.items():
        rows = [row for row in results["rows"] if row["world"] == world]
        if rows:
            parts.append(f"{title}\n\n{aligned(table(rows))}")
            parts.append(f"{title}: difference to the control\n\n{aligned(differences(rows))}")
    return "\n\n".join([*parts, "\n".join(wrapped(line) for line in legend(results))])


def as_markdown(results: Mapping[str, Any]) -> str:
    """Format the tables for a README: values and differences for each world."""
    parts = []
    for world, title in WORLDS.items():
        rows = [row for row in results["rows"] if row["world"] == world]
        if rows:
            parts += [f"{title}:", markdown_table(table(rows))]
            parts += [f"{title}, difference to the control:", markdown_table(differences(rows))]
    return "\n\n".join(parts)


def _cell(rows: list[Row], arm: str, measure: str, key: str, digits: int) -> str:
    values = list(values_of(rows, arm, measure, key).values())
    if not values:
        return ""
    if key != "success":
        low, high = interval_of_mean(values) if len(values) > 1 else over_demonstrations(rows, arm, measure)
        mean = f"{sum(values) / len(values):.{digits}f}"
        if low is None or not digits or measure == "health":
            return mean
        return f"{mean} ({low:.{digits}f} to {high:.{digits}f})"
    solved = [v for r in rows if (r["arm"], r["measure"]) == (arm, measure) for t in r["solved"].values() for v in t]
    low, high = (round(100 * end) for end in wilson_interval(sum(solved), len(solved)))
    return f"{round(100 * sum(solved) / len(solved))} % ({low}-{high})"


def _columns(rows: list[Row]) -> list[tuple[str, str, str, int]]:
    """The columns that have rows: a run may still be in progress."""
    measured = {row["measure"] for row in rows}
    return [column for column in COLUMNS if column[0] in measured]


def table(rows: list[Row]) -> list[list[str]]:
    """Make the table of one world: a row for each LAM and each reference."""
    shown = _columns(rows)
    cells = [["", *(title for _, _, title, _ in shown)]]
    for arm, name in {**LAMS, **REFERENCES}.items():
        if any(row["arm"] == arm for row in rows):
            cells.append([name, *(_cell(rows, arm, m, key, digits) for m, key, _, digits in shown)])
    return cells


def differences(rows: list[Row]) -> list[list[str]]:
    """Make the table of paired differences to the control, with intervals over seeds, and over episodes for success."""
    columns = [column for column in _columns(rows) if column[0] != "health"]
    cells = [["", *(title for _, _, title, _ in columns)]]
    for arm in ("plain", "cosine", "contrastive"):
        line = [LAMS[arm]]
        for measure, key, _, digits in columns:
            mean, low, high = difference_interval(
                values_of(rows, arm, measure, key), values_of(rows, "control", measure, key)
            )
            if mean is None:
                line.append("")
            elif key == "success":
                low, high = paired_bootstrap(rows, arm, "control", measure)
                line.append(f"{100 * mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})")
            else:
                if low is None:
                    low, high = over_demonstrations(rows, arm, measure, "control")
                over = "" if low is None else f" ({low:+.{digits}f} to {high:+.{digits}f})"
                line.append(f"{mean:+.{digits}f}{over}")
        cells.append(line)
    return cells


def legend(results: Mapping[str, Any]) -> list[str]:
    """Explain the columns, and what each interval covers."""
    settings, rows = results["settings"], results["rows"]
    counted = []
    for world, title in WORLDS.items():
        lams, policies = (
            len({row["seed"] for row in rows if (row["world"], row["measure"]) == (world, measure)})
            for measure in ("probe", "moto_gpt")
        )
        if lams:
            counted.append(f"{title.lower()} {lams} of the LAMs, {policies} of the policies in closed loop")
    return [
        f"Seeds: {'; '.join(counted)}. Each seed repeats the whole experiment: recordings, LAMs, policies, starts. "
        f"{settings['labelled']} labelled, {settings['unlabelled']} unlabelled, {settings['heldout']} held-out "
        f"demonstrations per task; {settings['episodes']} closed-loop episodes per task, policy and seed.",
        "Values are means over seeds, with 95 % t intervals over seeds; for a single seed, for R2, a bootstrap over "
        "demonstrations. Success: Wilson interval over all episodes; of a difference: bootstrap of the paired episodes "
        "within each seed and task. Only the t intervals cover the variation over seeds.",
        "Probe R2: ridge from z to the mean movement of the chunk, held-out demonstrations. MI: information of one "
        "code about the kind of movement within its task, mean over tokens, a lower bound on held-out episodes.",
        "R2 is not a measure of motion: on the demo's seed 0 a pair of two equal frames reaches .66 of the contrastive .83 "
        "and .59 of the control's .63, so z mostly learns where the hand is.",
        "Mean dir.: |E[z/|z|]|^2, near 1: constant. Recon/copy: error of the predicted frame over that of copying.",
        "Label R2: the actions decoded from z against the true ones, unlabelled demonstrations. On labels: a diffusion "
        "policy trained on labelled and pseudo-labelled demonstrations. Policies see image and task, no state.",
        f"Error: mean squared error of the first {settings['execute']} actions on held-out demonstrations.",
    ]
