"""Results as rows of results.json, one for each world, seed, arm and measure, added atomically."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from examples.demo.probe import Probe
from examples.refine_lam.pseudo_labels import probe_content
from examples.refine_lam.settings import Settings
from lara_adapter import __version__
from lara_adapter.storage.files import read_json, write_json

Row = dict[str, Any]

RESULTS = "results.json"
LAMS = {
    "plain": "plain LAM",
    "control": "control: more steps",
    "cosine": "LARA-LAM, cosine",
    "contrastive": "LARA-LAM, contrastive",
}
REFERENCES = {
    "no_tokens": "no latent tokens",
    "labelled_only": "labelled only",
    "true_labels": "true labels (ceiling)",
}
WORLDS = {"distractors": "With distractors", "clean": "Without distractors"}
_KEY = ("world", "seed", "arm", "measure")
# settings that may differ between runs into one folder
_MAY_DIFFER = {"output", "report", "markdown", "seeds", "worlds", "workers", "preset"}


class ResultsUnusable(RuntimeError):
    """The results in a folder cannot be used; the message says why and how to fix it."""


def fixed_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that all rows of one results.json share."""
    content = dataclasses.asdict(settings)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in content.items() if key not in _MAY_DIFFER}


def check(settings: Settings) -> None:
    """Check that a folder has no results of other settings.

    Raises:
        ResultsUnusable: it has.
    """
    file = settings.output / RESULTS
    if file.is_file():
        stored, current = read_json(file).get("settings", {}), fixed_settings(settings)
        other = sorted(key for key in current if stored.get(key) != current[key])
        if other:
            raise ResultsUnusable(f"{file} has results of another {', '.join(other)}; choose another --output")


def add_rows(settings: Settings, rows: Iterable[Row]) -> None:
    """Add rows to results.json, atomically; a row of the same world, seed, arm and measure is replaced.

    Args:
        settings: of the run.
        rows: "world", "seed", "arm", "measure", and numbers.

    Raises:
        ResultsUnusable: the file has results of other settings.
    """
    check(settings)
    file = settings.output / RESULTS
    stored = read_json(file)["rows"] if file.is_file() else []
    keyed = {tuple(row[key] for key in _KEY): row for row in [*stored, *rows]}
    packages = ("torch", "numpy", "metaworld", "mujoco")
    environment = {"python": platform.python_version(), "cores": os.cpu_count(), "lara_adapter": __version__}
    environment |= {name: importlib.metadata.version(name) for name in packages}
    content = {"settings": fixed_settings(settings), "environment": environment}
    write_json(file, {**content, "rows": [keyed[key] for key in sorted(keyed)]})


def lam_rows(arm: str, probed: Path, labels: Path) -> list[Row]:
    """Make the rows of one LAM from the folders of its probe and of its labels."""
    measured, labelled = read_json(probed / "measured.json"), read_json(labels / "measured.json")
    health = ("reconstruction_over_copy", "codes_used", "perplexity", "mean_direction")
    attention = ("attention_on_squares", "attention_on_motion")
    content = probe_content(Probe(**torch.load(probed / "probe.pt", weights_only=True)))
    probe = {**content, "r2_task_only": measured["r2_task_only"]}
    return [
        {"arm": arm, "measure": "probe", **probe},
        {"arm": arm, "measure": "chunk_probe", **labelled["chunk_probe"]},
        {"arm": arm, "measure": "information", **labelled["information"]},
        {"arm": arm, "measure": "health", **{name: measured[name] for name in health}},
        {"arm": arm, "measure": "attention", **{name: measured[name] for name in attention}},
        {"arm": arm, "measure": "pseudo_labels", **labelled["pseudo_labels"]},
    ]


def training_rows(measure: str, policies: Mapping[str, Path]) -> list[Row]:
    """Make the rows "moto_gpt_error" or "pseudo_policy_error" of policies on held-out demonstrations."""
    file = {"moto_gpt_error": "measured.json", "pseudo_policy_error": "action_error.json"}[measure]
    return [{"arm": arm, "measure": measure, **read_json(folder / file)} for arm, folder in policies.items()]


def acting_rows(arms: Mapping[str, Iterable[str]], evaluated: Mapping[str, Path]) -> list[Row]:
    """Make the closed-loop rows of one seed's policies; `solved` has 0 or 1 per start, by task.

    Args:
        arms: of "moto_gpt" and of "pseudo_policy".
        evaluated: folder of each task's episodes.
    """
    outcomes = {task: torch.load(folder / "success.pt", weights_only=True) for task, folder in evaluated.items()}
    rows = []
    for measure, names in arms.items():
        for arm in names:
            solved = {task: arms_solved[f"{measure} {arm}"].int().tolist() for task, arms_solved in outcomes.items()}
            everything = [value for values in solved.values() for value in values]
            rate = sum(everything) / len(everything)
            rows.append({"arm": arm, "measure": measure, "success": rate, "solved": solved})
    return rows
