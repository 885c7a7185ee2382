"""examples/quickstart.py as a newcomer runs it: from another folder, by its path."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lara_adapter.storage.files import read_json

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_quickstart(folder) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "quickstart.py"), "--steps", "24", "--output", "run"],
        capture_output=True, text=True, timeout=200, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_trains_saves_loads_acts_and_detaches(tmp_path):
    printed = run_quickstart(tmp_path)
    assert [line[:2] for line in printed.splitlines() if line[0] != " "] == [f"{step}." for step in range(1, 8)]
    over_copy = float(re.search(r"with (\S+) times the error", printed)[1])
    assert 0 < over_copy < 1, "the LAM has learnt nothing"
    assert "optimizer  holds every LARA parameter" in printed
    logged = re.findall(
        r"step (\d+): action loss (\S+), alignment loss (\S+), LAM loss (\S+), mean direction (\S+)", printed
    )
    assert [int(row[0]) for row in logged] == [6, 12, 18, 24, 1, 2, 3]
    assert all(0 < float(value) < 3 for row in logged for value in row[1:])
    before, after = map(float, re.search(r"new starts: (\S+) before, (\S+) after", printed).groups())
    assert after < before
    assert "the same actions: True" in printed
    assert "to train on, at step 24" in printed
    assert "0 tensors of LARA are left in the policy; the same actions as before: True" in printed
    assert (tmp_path / "run/adapter/policy_weights").is_dir()
    assert read_json(tmp_path / "run/adapter/lara_config.json")["alignment"]
    assert run_quickstart(tmp_path) == printed, "the same numbers each time"
