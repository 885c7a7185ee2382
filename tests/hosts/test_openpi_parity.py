"""The official release for openpi and `attach` on the same policy: equal losses and gradients. Needs a checkout of
LARA_posttrain_openpi; each comparison is a process of its own, because that checkout has an openpi of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openpi", reason="openpi is not installed: make test-openpi")

ROOT = Path(__file__).parents[2]
SOURCE = os.environ.get("LARA_OFFICIAL_OPENPI_SRC")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not SOURCE,
        reason="set LARA_OFFICIAL_OPENPI_SRC to a checkout of LARA_posttrain_openpi (github.com/lmy1001/LARA), and "
        "pip install hydra-core omegaconf lpips",
    ),
]

PROGRAM = """
import json
from benchmarks.parity import openpi as p
import torch
torch.set_num_threads(1)
wrong = {wrong!r}
stock = p.OpenpiLaraSettings
p.OpenpiLaraSettings = lambda **given: stock(**{{**given, **wrong}})
cases = tuple(case for case in p.CASES if case.name in {names!r})
print("RESULT" + json.dumps(p.run(p.Path({source!r}).resolve(), 1, cases)))
"""


def compare(*names: str, **wrong) -> dict:
    text = PROGRAM.format(wrong=wrong, names=list(names), source=SOURCE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT")[2])


def test_losses_and_gradients_equal_the_official_ones():
    result = compare("pi0.5, release", "pi0, release")
    assert len(result["cases"]) == 2
    for name, case in result["cases"].items():
        for dtype, tolerance in result["tolerance"].items():
            found = case[dtype]
            assert found["codes_that_differ"] == 0
            assert not any(found["left_out"].values()), found["left_out"]
            for row in found["values"].values():
                assert row["rel"] <= tolerance, (name, dtype, row)
            for loss, groups in found["gradients"].items():
                for group, row in groups.items():
                    assert row["rel"] <= tolerance, (name, dtype, loss, group, row)
        assert set(case["float32"]["gradients"]["align"]) == {
            "VLM", "action expert", "action projections", "projector", "LAM: M-Former", "LAM: resamplers",
        }  # fmt: skip
    assert result["passes"]


@pytest.mark.parametrize("wrong", [{"after_norm": False}, {"token": "mean_valid"}, {"align_weight": 0.0101}], ids=str)
def test_the_comparison_sees_a_small_mistake(wrong):
    result = compare("pi0.5, release, perceptual off", **wrong)
    assert not result["passes"]
