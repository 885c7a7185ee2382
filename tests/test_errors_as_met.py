"""Every error as a user meets it: from a loop of ten lines or the command line, on one line that fits a terminal."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from helpers.toys import DitPolicy, make_batch

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara, cli, errors

LONGEST = 480  # six lines of 80


def small() -> LatentActionModel:
    return LatentActionModel(LatentActionConfig.tiny())


def attached(policy=None, **settings):
    policy = (policy or DitPolicy()).train()
    return policy, attach_lara(policy, small(), **settings)


def train(batch, policy=None, **settings):
    policy, _ = attached(policy, **settings)
    policy(batch)["loss"].backward()


def frozen_below_the_tap():
    policy = DitPolicy().requires_grad_(False)
    policy.action_out.requires_grad_(True)
    train(make_batch(), policy, layer=1)


def optimizer_made_too_early():
    policy = DitPolicy().train()
    optimizer = torch.optim.AdamW(policy.parameters())
    lara = attach_lara(policy, small())
    lara.check(make_batch(), optimizer)


def weights_that_are_nan():
    policy, _ = attached()
    torch.nn.init.constant_(policy.transformer_blocks[0].mlp[0].weight, float("nan"))
    policy(make_batch())["loss"].backward()


class NoLoss(DitPolicy):
    def forward(self, batch):
        return {"flow": super().forward(batch)["loss"]}


class Unused(DitPolicy):
    """Its blocks are never called."""

    def denoise(self, state, noisy, time):
        return self.action_out(
            self.action_in(torch.cat([noisy, time[:, None, None].expand(-1, noisy.shape[1], 1)], -1))
        )


def without(*names):
    return {name: value for name, value in make_batch().items() if name not in names}


def request_that_the_policy_refuses():
    pytest.importorskip("zmq")
    pytest.importorskip("msgpack")
    from helpers.serving_policies import Bare, serving

    from lara_adapter.serving import PolicyClient

    with serving(Bare()) as server, PolicyClient(port=server.port) as client:
        client.get_action({"state": np.zeros((1, 5), np.float32)})


def page_without_jinja2():
    from lara_adapter.page import write_page

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        write_page("page.html", "title", "summary", [])


PROVOKE = {
    "LaraArgumentError": lambda: attached(align_weight=-1.0),
    "TapNotFound": lambda: attached(layer=40),
    "TapNeverFired": lambda: train(make_batch(), Unused(), blocks="transformer_blocks"),
    "TapDetached": frozen_below_the_tap,
    "AttachOrderError": lambda: attach_lara(attached()[0], small()),
    "FrameError": lambda: train(without("lara_frames")),
    "TokenError": lambda: train(make_batch(), token=99),
    "HostOutputError": lambda: train(make_batch(), NoLoss()),
    "OptimizerCoverageError": optimizer_made_too_early,
    "NonFiniteError": weights_that_are_nan,
    "ServingError": request_that_the_policy_refuses,
    "HostNotInstalled": page_without_jinja2,
}


@pytest.mark.parametrize("name", PROVOKE)
def test_in_a_loop(name):
    with pytest.raises(getattr(errors, name)) as caught:
        PROVOKE[name]()
    fits(name, str(caught.value))


def test_no_error_is_left_out():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and name != "LaraError"}
    assert {name for name in classes if getattr(errors, name).__module__ == errors.__name__} == {*PROVOKE, *COMMANDS}


def fits(name: str, message: str) -> None:
    assert "\n" not in message, name
    assert 30 < len(message) <= LONGEST, message


COMMANDS = {
    "PolicySourceError": ["inspect", "no/such/folder"],
    "AdapterFormatError": ["health", "EMPTY", "EMPTY"],
    "DatasetError": ["train-lam", "EMPTY", "--output", "RUN", "--preset", "tiny"],
    "TapNotFound": ["inspect", "examples/mini_vla.py:MiniVLA", "--layer", "40"],
    "ServingTimeout": ["eval", "drawer-open", "--output", "RUN", "--port", "1", "--wait-s", "0.2"],
    "HubError": ["health", "user/no-such-lam", "EMPTY"],
    "LaraArgumentError": ["eval", "drawer-open", "--output", "RUN", "--episodes", "0"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_on_the_command_line(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    if name == "ServingTimeout":
        pytest.importorskip("metaworld")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "RUN": str(tmp_path / "run")}
    status = cli.main([places.get(word, word) for word in COMMANDS[name]])
    output = capsys.readouterr()
    assert status == (1 if name == "TapNotFound" else 2)
    said = output.err if status == 2 else output.out
    line = [line for line in said.splitlines() if line.startswith("lara: ")] if status == 2 else [said.strip()]
    assert len(line) == 1, said
    assert "Traceback" not in output.err + output.out
    assert len(re.sub(re.escape(str(tmp_path)) + r"\S*", "", line[0])) <= LONGEST
