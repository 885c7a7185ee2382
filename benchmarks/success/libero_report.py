"""Tables of the rows of LIBERO tasks with scripted demonstrations.

python -m benchmarks.records --write       # results/success/rows-libero.jsonl -> benchmarks/README.md
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks import markdown
from benchmarks.success import report
from benchmarks.success.arms import CONTROL
from benchmarks.success.libero import ROWS
from benchmarks.success.rows import Row, read_rows

SHOWN = {"action_loss": 3, "cosine": 2, "mean_direction": 2, "perplexity": 0}  # of a log, with decimals


@functools.cache
def recorded() -> dict[str, tuple[report.Rows, dict[str, Any]]]:
    """The committed groups of rows, most demonstrations first, with their summaries."""
    groups = report.group_rows(read_rows(ROWS))
    most_first = sorted(groups, key=lambda name: -next(iter(groups[name].values()))["settings"]["demos"])
    return {name: (groups[name], report.summarise(groups[name])) for name in most_first}


def task_table(rows: report.Rows) -> str:
    """Success of each task and arm, in per cent of the episodes of all seeds."""
    acted = {key: row for key, row in rows.items() if "solved" in row}
    of_arm = {arm: [report.solved(row) for (_, name), row in acted.items() if name == arm] for arm in report.ORDER}
    arms = [arm for arm, found in of_arm.items() if found]
    tasks = next(iter(acted.values()))["solved"]
    lines = []
    for index, task in enumerate(tasks):
        name = task.removeprefix("pick_up_the_").removesuffix("_and_place_it_in_the_basket").replace("_", " ")
        rates = [100 * mean(float(found[index].mean()) for found in of_arm[arm]) for arm in arms]
        lines.append([name, *(f"{rate:.0f}" for rate in rates)])
    return markdown.table(("into the basket, % solved", *arms), lines)


def play_table(rows: report.Rows) -> str:
    """What each LAM says of movement on play that it was not trained on."""

    lines = []
    for arm in report.ORDER:
        own = [row["lam"] for (_, name), row in rows.items() if name == arm and "lam" in row]
        if own:
            over = "" if arm in ("before", CONTROL) else report.gain(report.compare(rows, arm, CONTROL, play_r2), 1, 2)
            means = [f"{mean(lam[key] for lam in own):.2f}" for key in ("play_r2", "still_r2")]
            lines.append([arm, str(len(own)), *means, over])
    return markdown.table(
        ("arm", "seeds", "R2 on play", "of a pair of two equal frames", "over control (t, 95 %)"), lines
    )


def section() -> str:
    """The tables of each number of demonstrations."""
    if not recorded():
        return "No rows yet."
    parts = []
    for name, (rows, summary) in recorded().items():
        parts.append(f"**{name}**\n\n{report.table(summary)}\n\n{report.power(rows)}")
        parts += [task_table(rows), play_table(rows)]
    return "\n\n".join(parts)


def play_r2(row: Row) -> float | None:
    """What its LAM says of movement on held-out play."""
    return row["lam"]["play_r2"] if "lam" in row else None


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def reading() -> str:
    """What the rows show."""
    lines = []
    for _, (rows, summary) in recorded().items():
        settings = next(iter(rows.values()))["settings"]
        base, arms = summary["dit_only"], ("contrastive", "cosine", "frozen")
        gains = ", ".join(f"{arm} {report.gain(summary[arm]['success_gain'], 100, 1)}" for arm in arms)
        rates = [
            float(report.solved(row).mean()) for (_, arm), row in rows.items() if arm == "dit_only" and "solved" in row
        ]
        inside = min(rates) > 0.1 and max(rates) < 0.9
        free = "so it is neither capped nor at floor" if inside else "near an end of the scale"
        probes = {
            name: report.compare(rows, "contrastive", CONTROL, value)
            for name, value in (("probe", report.probe_r2), ("play", play_r2))
        }
        by_seed = f" ({100 * min(rates):.0f} to {100 * max(rates):.0f} by seed)" if len(rates) > 1 else ""
        lines.append(
            f"""**{settings["demos"]} demonstrations, {_seeds(len(rates))}**: DiT-only solves
            {100 * base["success"]:.1f} %{by_seed}, {free}; over it, in points: {gains}. Of the LAM,
            contrastive over control ({_seeds(probes["probe"]["seeds"])}): R2 of the action
            {report.gain(probes["probe"], 1, 2)}, of z alone on play
            {report.gain(probes["play"], 1, 2)}."""
        )
    return markdown.bullets(*lines) if lines else "Nothing to read yet."


def logs() -> str:
    """What a healthy and a collapsing run logged, side by side: the first seed of the first group."""
    rows = next((rows for rows, _ in recorded().values()), {})
    first = min((seed for seed, _ in rows), default=0)
    arms = ("contrastive", "cosine")
    if any("log" not in rows.get((first, arm), {}) for arm in arms):
        return "Not recorded yet."
    head, *steps = zip(*(_log_lines(rows[first, arm]["log"]) for arm in arms))
    shown = [f"{'healthy: ' + arms[0]:<{len(head[0])}}   collapsing: {arms[1]}", "   ".join(head)]
    return "```text\n" + "\n".join([*shown, *("   ".join(line) for line in steps)]) + "\n```"


def _log_lines(log: dict[str, list[float]]) -> list[str]:
    lines = [f"{'step':>4}" + "".join(f"{name:>{len(name) + 1}}" for name in SHOWN)]
    for at, step in enumerate(log["step"]):
        lines.append(
            f"{int(step):4}" + "".join(f"{log[name][at]:{len(name) + 1}.{digits}f}" for name, digits in SHOWN.items())
        )
    return lines


SECTIONS = {
    "benchmarks/README.md": {"libero success": section, "libero reading": reading},
    "docs/index.md": {"logs": logs},
}


def problems() -> Iterator[str]:
    """Rows that are not comparable."""
    yield from report.doubtful_rows(ROWS)
