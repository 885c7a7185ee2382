"""Adapters that earlier versions wrote load in this one and give what they gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from golden_policy import Policy, batch, losses  # noqa: E402

from lara_adapter import LatentActionModel, load_lara  # noqa: E402
from lara_adapter.files import read_tensors  # noqa: E402

EXPECTED = json.loads((HERE / "expected.json").read_text())


def base():
    policy = Policy()
    policy.load_state_dict(read_tensors(HERE / "base.safetensors"))
    return policy.train()


@pytest.mark.parametrize("name", ["cosine-mlp", "contrastive-linear", "lora", "trainable"])
def test_golden_adapters(name):
    policy = base()
    if name == "lora":
        peft = pytest.importorskip("peft")
        policy = peft.PeftModel.from_pretrained(policy, HERE / name / "policy_lora", is_trainable=True)
    lara = load_lara(policy, HERE / name)
    wanted = {key: value for key, value in EXPECTED[name].items() if key != "acting"}
    assert losses(policy, lara) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("name", "merge"), [("lora", False), ("lora", True), ("trainable", False)])
def test_golden_policies_act(name, merge):
    if name == "lora":
        pytest.importorskip("peft")
    acting = load_lara(base(), HERE / name, inference=True, merge=merge)
    with torch.no_grad():
        found, before = (policy(batch())["loss"].item() for policy in (acting, base()))
    assert found == pytest.approx(EXPECTED[name]["acting"], rel=1e-5)
    assert abs(before - found) > 1e-4  # the base is another policy


def test_golden_latent_action_model():
    frames = batch()["lara_frames"]
    lam = LatentActionModel.from_pretrained(HERE / "lam-alone").train()
    assert lam(frames[:, 0], frames[:, 1]).loss.item() == pytest.approx(EXPECTED["lam-alone"]["loss"], rel=1e-3)


def test_they_stay_small():
    for folder in (path for path in HERE.iterdir() if (path / "README.md").exists() or path.name == "lam-alone"):
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 200_000
