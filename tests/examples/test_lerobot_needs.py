"""Without LeRobot its examples say in one line what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# a module that is None in sys.modules counts as not installed, wherever this runs
_WITHOUT = """
import runpy, sys
script, *missing = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing))
sys.argv = [script, "--help"]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("lerobot_posttrain.py", "lerobot"),
        ("lerobot_posttrain.py", "accelerate"),
        ("record_metaworld.py", "lerobot"),
        ("record_metaworld.py", "metaworld"),
    ],
)
def test_says_what_to_install(script, missing):
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(EXAMPLES / script), missing], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},  # as when a script is run by its path
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert missing in done.stderr
    assert "pip install" in done.stderr
    assert not done.stdout
