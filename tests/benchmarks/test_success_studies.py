"""The Meta-World studies of benchmarks/success, each from nothing at the smallest size, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("metaworld")

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--demos 2 --heldout 4 --play 3 --play-steps 48 --lam-steps 8 --policy-steps 6 --batch 8 --episodes 1 --max-steps 16 "
    "--seeds 0 --workers 1"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.mark.long
@pytest.mark.parametrize(
    ("study", "options", "arms"),
    [
        ("success", "--regimes clean --arms dit_only contrastive control", 4),  # and the LAM before
        ("success.motion", "--regimes clean --arms contrastive control --heldout-play 3 --widths 4", 3),
        (
            "success.training",
            "--regimes distractors --heldout-play 3 --long-steps 4 --labelled 2 --arms labelled vit",
            2,
        ),
        ("success.video", "--regimes clean --video 3 --supervised-steps 4", 7),
        ("success.reconstruct", "--trainings control --shares 0.5", 1),
    ],
)
def test_a_study_runs_from_nothing_and_a_second_call_adds_no_row(gl, cache, study, options, arms):
    rows = cache / f"{study}.jsonl"
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{study}",
        *options.split(),
        *TINY.split(),
        "--cache",
        str(cache / "jobs"),
    ]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--rows", str(rows)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=220, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert len([json.loads(line) for line in rows.read_text().splitlines()]) == arms
