from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


# CI runs the smoke preset as it is
SMALLEST = (
    "--preset", "smoke", "--workers", "1", "--lam-steps", "6", "--policy-steps", "6", "--batch", "8", "--play", "2",
    "--play-steps", "40", "--episodes", "1", "--max-steps", "16",
)  # fmt: skip


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )


def test_flags_change_the_preset():
    from examples.demo.__main__ import PRESETS, read_settings

    assert read_settings([]) == PRESETS["demo"]
    assert read_settings(["--preset", "smoke"]) == PRESETS["smoke"]
    changed = read_settings(["--preset=smoke", "--demos", "7", "--no-distractors", "--output", "/tmp/x"])
    assert (changed.demos, changed.distractors, changed.output) == (7, False, Path("/tmp/x"))
    assert changed.lam_steps == PRESETS["smoke"].lam_steps


def test_all_arms_differ_in_lara_alone():
    from examples.demo.__main__ import PRESETS

    arms = PRESETS["demo"].arms()
    assert arms["dit_only"] is None
    assert arms["frozen_lam"] == {"align_weight": 0.1, "lam_weight": 0.1, "train_lam": False}
    assert arms["lara_cosine"]["alignment"] == "cosine"
    assert arms["lara_contrastive"]["alignment"] == "contrastive"


@pytest.mark.gl
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1100)
def test_smoke_run_makes_everything_and_a_second_run_recomputes_nothing(gl, tmp_path):
    output = tmp_path / "demo"
    first = run_demo(*SMALLEST, "--output", str(output))
    assert first.returncode == 0, first.stdout + first.stderr
    for name in (
        "curves.png",
        "motion.png",
        "probe.png",
        "predictions.png",
        "attention.png",
        "report.md",
        "report.html",
    ):
        assert (output / name).stat().st_size > 1000, name
    arms = ("dit_only", "frozen_lam", "lara_cosine", "lara_contrastive")
    for arm in arms:
        assert (output / "rollouts" / f"{arm}.gif").read_bytes()[:4] == b"GIF8"
    results = json.loads((output / "results.json").read_text())
    assert tuple(sorted(results["policies"])) == tuple(sorted(arms))
    assert set(results["latent_action_models"]) == {"before", "control", "lara_cosine", "lara_contrastive"}
    assert set(results["motion"]) == set(results["latent_action_models"])
    assert results["motion"]["before"]["displacement"]["episodes"] == 4
    assert "| motion of the hand |" in (output / "report.md").read_text()
    assert results["adapter"]["actions_identical"]
    assert results["adapter"]["alignment_identical"]
    assert (output / "adapter" / "lara_config.json").is_file()
    for name in re.findall(r"\]\(([^)]+)\)", (output / "report.md").read_text()):
        assert (output / name).is_file(), f"report.md shows {name}"
    assert "DiT only" in first.stdout
    assert "Traceback" not in first.stderr

    times = {path: path.stat().st_mtime_ns for path in (output / "cache").rglob("*")}
    second = run_demo(*SMALLEST, "--output", str(output))
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in (output / "cache").rglob("*")} == times
    assert json.loads((output / "results.json").read_text()) == results
