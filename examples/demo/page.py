"""The demo's results as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.demo.tables import Rows
from lara_adapter.page import Film, Picture, Table, Text, write_page

PICTURES = {
    "curves.png": "Training",
    "motion.png": "Motion in the latent",
    "probe.png": "Linear probe",
    "attention.png": "What the LAMs look at",
    "predictions.png": "Frames and their predictions",
}


def write(folder: Path, results: Mapping[str, Any], tables: Mapping[str, Rows], reading: Sequence[str]) -> Path:
    """Write report.html beside the pictures and rollouts of a run.

    Args:
        folder: of the results.
        results: summarised.
        tables: title -> rows, the head first.
        reading: what the numbers say.
    """
    films = {arm: folder / "rollouts" / f"{arm}.gif" for arm in results["policies"]}
    parts = [
        *(Table(title, rows[0], rows[1:]) for title, rows in tables.items()),
        Text("Interpretation", [("", line) for line in reading]),
        Film("Rollouts", {arm: file for arm, file in films.items() if file.is_file()}),
        *(Picture(title, folder / name) for name, title in PICTURES.items()),
    ]
    summary = "LARA from nothing in Meta-World: success, action error, and what the latent action models know"
    return write_page(folder / "report.html", "LARA demo", summary, parts)
