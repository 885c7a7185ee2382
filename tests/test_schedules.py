import math

import pytest
import torch
from helpers.toys import make_batch

from lara_adapter import AdapterFormatError, LaraArgumentError, attach_lara
from lara_adapter.schedules import Constant, Cosine, Cutoff, Warmup, weight_at, weight_from_json, weight_to_json

CASES = [
    (Constant(0.3), lambda s: 0.3),
    (Warmup(0.2, 10), lambda s: 0.2 * min(s / 10, 1)),
    (Cosine(1.0, 0.1, 8), lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * min(s / 8, 1))) / 2),
    (Cutoff(0.5, 4), lambda s: 0.5 if s < 4 else 0.0),
]


@pytest.mark.parametrize(("schedule", "reference"), CASES)
def test_values(schedule, reference):
    for step in (0, 1, 3, 4, 7, 8, 10, 100):
        assert float(schedule(step)) == pytest.approx(reference(step), abs=1e-7)
        assert float(schedule(torch.tensor(step))) == pytest.approx(reference(step), abs=1e-7)


@pytest.mark.parametrize("schedule", [case[0] for case in CASES] + [0.25])
def test_json_round_trip(schedule):
    assert weight_from_json(weight_to_json(schedule)) == schedule


def test_a_callable_cannot_be_stored():
    assert weight_to_json(lambda step: 0.1) is None


@pytest.mark.parametrize(
    "value", [{"schedule": "exec"}, {"schedule": "warmup"}, {"schedule": "cutoff", "weight": 1, "x": 2}]
)
def test_foreign_json(value):
    with pytest.raises(AdapterFormatError, match="is not a weight schedule"):
        weight_from_json(value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_weights(value, policy, lam):
    for argument in ("align_weight", "lam_weight", "lam_grad_scale"):
        with pytest.raises(LaraArgumentError, match=f"{argument}="):
            attach_lara(policy, lam, **{argument: value})
    with pytest.raises(LaraArgumentError, match="weight="):
        Warmup(value, 10)


def test_a_users_callable_is_checked_at_each_step():
    assert weight_at(lambda step: step / 2, torch.tensor(3)) == 1.5
    with pytest.raises(LaraArgumentError, match=r"returned -1\.0 at step 3"):
        weight_at(lambda step: -1.0, torch.tensor(3))


def test_the_weights_follow_the_schedule_and_the_step_can_be_set(policy, lam):
    lara = attach_lara(policy, lam, align_weight=Warmup(0.4, 4), lam_weight=lambda step: 0.1 * step)
    batch = make_batch()
    for step in range(6):
        out = policy(batch)
        metrics = lara.metrics()
        assert metrics["align_weight"] == pytest.approx(0.4 * min(step / 4, 1))
        assert metrics["lam_weight"] == pytest.approx(0.1 * step)
        wanted = metrics["align_weight"] * metrics["align_loss"] + metrics["lam_weight"] * metrics["lam_loss"]
        assert metrics["total"] == pytest.approx(wanted, rel=1e-5)
        assert out["loss"].requires_grad
    assert lara.step == 6
    lara.step = 2
    policy(batch)
    assert lara.metrics()["align_weight"] == pytest.approx(0.2)
