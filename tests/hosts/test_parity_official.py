"""The official release and attach_lara on the same policy: equal losses, equal gradients. Needs a checkout of LARA_full."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from benchmarks.parity import official as parity
from benchmarks.parity.differences import TOLERANCE

SOURCE = os.environ.get("LARA_OFFICIAL_SRC")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE, reason="set LARA_OFFICIAL_SRC to a checkout of LARA_full (github.com/lmy1001/LARA)"),
]

EQUAL = [case for case in parity.CASES if case.switch]
SHUFFLED = [case for case in parity.CASES if not case.switch]


def compare(case):
    return parity.run(Path(SOURCE).resolve(), seeds=1, chosen=[case])["cases"][case.name]


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_losses_and_gradients_equal_the_official_ones(case):
    result = compare(case)
    for dtype, tolerance in TOLERANCE.items():
        found = result[dtype]
        assert found["codes_that_differ"] == 0
        assert not any(found["left_out"].values()), found["left_out"]
        assert not found["without_gradient"]
        for name, row in found["values"].items():
            assert row["rel"] <= tolerance, (dtype, name, row)
        if case.kinks and dtype == "float32":
            continue
        for loss, groups in found["gradients"].items():
            for group, row in groups.items():
                assert row["rel"] <= tolerance, (dtype, loss, group, row)
        assert found["passes"]


def test_every_part_takes_part():
    result = compare(EQUAL[0])["float32"]
    assert set(result["gradients"]["total"]) == {
        "VLM stand-in", "DiT blocks", "rest of the head", "projector", "LAM: M-Former", "LAM: codebook",
        "LAM: resamplers", "LAM: decoder",
    }  # fmt: skip
    assert sum(row["tensors"] for row in result["gradients"]["total"].values()) == result["trainable_tensors"]
    # the alignment reaches the policy below the tap, the projector and the LAM's inverse dynamics, and no more
    align = result["gradients"]["align"]
    assert 0 < align["DiT blocks"]["tensors"] < result["gradients"]["action"]["DiT blocks"]["tensors"]
    assert "LAM: decoder" not in align
    assert "LAM: codebook" not in align
    assert result["codes_used"] > 4


def test_without_the_switch_the_reference_does_not_even_equal_itself():
    (case,) = SHUFFLED
    result = compare(case)
    for found in (result["float32"], result["official_against_itself"]):
        assert found["values"]["latent, continuous"]["rel"] > 1e-3
    assert result["float32"]["values"]["action"]["rel"] == 0


@pytest.mark.parametrize(
    "wrong", [{"layer": -2}, {"token": 0}, {"align_weight": 0.0101}, {"lam_grad_scale": 0.99}], ids=str
)
def test_the_comparison_sees_a_small_mistake(monkeypatch, wrong):
    attach = parity.attach_lara

    @functools.wraps(attach)
    def attach_wrongly(*args, **kwargs):
        return attach(*args, **{**kwargs, **wrong})

    monkeypatch.setattr(parity, "attach_lara", attach_wrongly)
    assert not compare(EQUAL[0])["float32"]["passes"]
