"""The success rows on disk: one line of JSON each, appended as they come."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from lara_adapter import __version__
from lara_adapter.storage.files import read_json

ROWS = RESULTS / "success" / "rows.jsonl"
MOTION = RESULTS / "success" / "motion.jsonl"

CONFIRM = "rows-confirm.jsonl"  # beside the others: rows of a confirmation on new seeds, never mixed with them

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows that are there; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def measured_arms(path: Path, regime: str, seed: int, settings: dict[str, Any]) -> set[str]:
    """The arms of one regime, seed and set of settings that a file has rows of."""
    same = json.loads(json.dumps(settings))
    return {
        row["arm"] for row in read_rows(path)
        if (row["regime"], row["seed"], row["settings"]) == (regime, seed, same)
    }  # fmt: skip


def append_missing(
    path: Path,
    regime: str,
    seed: int,
    settings: dict[str, Any],
    arms: Sequence[str],
    run: Callable[[list[str]], list[Row]],
) -> None:
    """Run the arms that a file has no rows of, if there are any, and add the rows that are new.

    Args:
        path: the file.
        regime: of the rows.
        seed: likewise.
        settings: likewise.
        arms: the ones that the file should have.
        run: the arms that are missing -> their rows, perhaps with others that they need.
    """
    there = measured_arms(path, regime, seed, settings)
    missing = [arm for arm in arms if arm not in there]
    for row in run(missing) if missing else ():
        if row["arm"] not in there:
            append_row(path, row)


def environment(*packages: str) -> dict[str, str]:
    """What a row was measured with: the library, Python, the machine's architecture, and packages."""
    found = {"lara_adapter": __version__, "python": platform.python_version(), "machine": platform.machine()}
    return found | {name: version(name) for name in ("torch", *packages)}


def read_numbers(path: Path) -> dict[str, float]:
    """The plain numbers of a measurement, without lists and texts."""
    return {key: value for key, value in read_json(path).items() if type(value) in (int, float)}


def append_row(path: Path, row: Row) -> None:
    """Add a row, on the disk before it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as stream:
        stream.write(("\n" if cut_short else "") + json.dumps(row, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
