"""The report on closed-loop episodes as one HTML page, with their films."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..page import Bars, Film, Part, Table, write_page

__all__ = ["write_report_page"]


def write_report_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html into the folder of an evaluation.

    Args:
        report: of :meth:`~lara_adapter.evaluation.Rollouts.run`.
        folder: with `videos/`, where there are some.

    Raises:
        HostNotInstalled: jinja2 is missing.
    """
    tasks, settings = report["tasks"], report["settings"]
    counted = {**tasks, "all": report["all"]} if len(tasks) > 1 else tasks
    bars = {
        name: (row["rate"], *row["interval_95"], f"{row['successes']} of {row['episodes']}")
        for name, row in counted.items()
    }
    films = {
        f"{task}, seed {run['seed']}: {'solved' if run['success'] else 'not solved'} after {run['steps']} steps": file
        for task, row in tasks.items()
        for run in row["runs"]
        if (file := folder / "videos" / f"{task}-{run['seed']}.mp4").is_file()
    }
    runs = [
        (task, run["seed"], "solved" if run["success"] else "not solved", run["steps"], run["requests"])
        for task, row in tasks.items()
        for run in row["runs"]
    ]
    total = report["all"]
    parts: list[Part] = [
        Bars("Success", bars, "The line in each bar is the 95 % Wilson interval."),
        *([Film("Films", films)] if films else []),
        Table("Episodes", ("task", "seed", "result", "steps", "requests"), runs),
        Table("Settings", ("setting", "value"), [(name, value) for name, value in settings.items()]),
    ]
    summary = (
        f"{total['successes']} of {total['episodes']} episodes solved in {settings['simulator']}; "
        f"policy: {settings['policy']}"
    )
    return write_page(folder / "report.html", "Closed-loop evaluation", summary, parts)
