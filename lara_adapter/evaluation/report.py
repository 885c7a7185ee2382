"""Finished episodes on disk, one file each, and the report on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import LaraArgumentError
from ..storage.files import read_json, write_json

__all__ = ["EpisodeStore", "format_report", "make_report", "wilson_interval"]

_TIMES = ("seconds", "milliseconds_per_request")


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Ends, in [0, 1], of Wilson's score interval of a success rate, which is accurate near 0 and 1 too.

    `trials` > 0; `z` is the normal quantile, 1.96 for 95 %.
    """
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


class EpisodeStore:
    """A folder with settings.json, episodes/<task>-<seed>.json, videos/ and report.json."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open or create it.

        Raises:
            LaraArgumentError: the folder holds episodes of other settings, which must not be mixed with these.
        """
        self.folder, self.settings = folder, dict(settings)
        file = folder / "settings.json"
        if not file.is_file() or not (folder / "episodes").is_dir():  # nothing was finished with those
            write_json(file, self.settings)
            return
        before = read_json(file)
        changed = sorted(key for key in {*before, *self.settings} if before.get(key) != self.settings.get(key))
        if changed:
            changes = "; ".join(f"{key}: {before.get(key)!r} then, {self.settings.get(key)!r} now" for key in changed)
            raise LaraArgumentError(
                f"{folder} holds episodes of other settings ({changes}); choose another output folder"
            )

    def _file(self, task: str, seed: int) -> Path:
        return self.folder / "episodes" / f"{task}-{seed}.json"

    def finished(self, task: str, seed: int) -> dict[str, Any] | None:
        """The result of an episode, or None if it has not been finished."""
        file = self._file(task, seed)
        return read_json(file) if file.is_file() else None

    def keep(self, task: str, seed: int, result: Mapping[str, Any]) -> None:
        """Save a finished episode, atomically."""
        write_json(self._file(task, seed), result)

    def video(self, task: str, seed: int) -> Path:
        """Path of an episode's video."""
        return self.folder / "videos" / f"{task}-{seed}.mp4"


def make_report(settings: Mapping[str, Any], episodes: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Summarise the episodes of each task (`success`, `steps`, `seed`, ...).

    Returns:
        `settings`; `tasks`: for each its successes, episodes, rate, 95 % interval (Wilson), mean steps when solved, and the
        episodes (`runs`), without the times that they took: equal episodes give equal reports; `all`: the same over all
        tasks.
    """
    tasks = {
        task: {**_count(rows), "runs": [{key: row[key] for key in row if key not in _TIMES} for row in rows]}
        for task, rows in episodes.items()
    }
    everything = [row for rows in episodes.values() for row in rows]
    return {"settings": dict(settings), "tasks": tasks, "all": _count(everything)}


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    solved = [row["steps"] for row in rows if row["success"]]
    return {
        "successes": len(solved),
        "episodes": len(rows),
        "rate": len(solved) / len(rows),
        "interval_95": list(wilson_interval(len(solved), len(rows))),
        "mean_steps_when_solved": sum(solved) / len(solved) if solved else None,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    rows = {**report["tasks"], "all": report["all"]} if len(report["tasks"]) > 1 else report["tasks"]
    width = max(4, *map(len, rows))
    lines = [f"{'task':<{width}}  success  95 % interval  mean steps when solved"]
    lines.append("-" * len(lines[0]))
    for name, row in rows.items():
        low, high = (100 * end for end in row["interval_95"])
        steps = "-" if row["mean_steps_when_solved"] is None else f"{row['mean_steps_when_solved']:.0f}"
        count, interval = f"{row['successes']}/{row['episodes']}", f"{low:.0f} - {high:.0f} %"
        lines.append(f"{name:<{width}}  {count:>7}  {interval:>13}  {steps:>22}")
    return "\n".join(lines)
