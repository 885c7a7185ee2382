"""What `lara serve` opens: modules, objects, the demo's policies; the token; no part of LARA in its process."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tyro")
pytest.importorskip("zmq")
pytest.importorskip("msgpack")

from helpers.serving_policies import ROOT, serving
from helpers.toys import OwnLam, make_batch
from lara_adapter.integrations.served import open_served

from lara_adapter import LaraArgumentError, PolicySourceError, ServingError, attach_lara, cli
from lara_adapter.cli.credentials import read_token
from lara_adapter.serving import PolicyClient, PolicyServer

POLICIES = f"{ROOT / 'examples' / 'served_policies.py'}"


class Noisy(nn.Module):
    """An nn.Module whose action is its observation and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 2), nn.Dropout(0.5)

    def get_action(self, observation):
        assert not torch.is_grad_enabled()
        assert isinstance(observation["words"], list)
        state = self.dropout(self.layer(observation["state"]))
        return {"action": state + torch.randn_like(state)}


class Silent(nn.Module):
    """It cannot act."""


def make_dict() -> dict:
    return {}


def test_a_module_gets_tensors_acts_in_eval_mode_and_its_noise_is_the_seeds():
    torch.manual_seed(1)
    module = Noisy()
    served = open_served_module(module)
    state, words = np.ones((1, 4), np.float32), ["a"]
    with torch.inference_mode():
        torch.manual_seed(5)
        expected = module.eval().get_action({"state": torch.ones(1, 4), "words": words})["action"].numpy()
    with serving(served) as server, PolicyClient(port=server.port) as client:
        before = torch.random.get_rng_state()
        first, other, again = (
            client.get_action({"state": state, "words": words}, {"seed": seed})[0]["action"] for seed in (5, 6, 5)
        )
        assert torch.equal(torch.random.get_rng_state(), before)  # other callers' noise is not touched
        assert np.array_equal(first, expected)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
        for seed in (-1, "x", 2**63, True, 1.5):
            with pytest.raises(ServingError, match="seed="):
                client.get_action({"state": state, "words": words}, {"seed": seed})


def open_served_module(module):
    from lara_adapter.integrations.module_policy import ModulePolicy

    return ModulePolicy(module)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{__name__}:Silent", "has no get_action"),
        (f"{__name__}:make_dict", "dict has no get_action"),
        ("no/such/folder", "is not a folder here"),
        (f"{POLICIES}:nothing", "has no 'nothing'"),
        (f"{POLICIES}:lara_cosine", "FileNotFoundError"),
    ],
)
def test_sources_that_cannot_be_served(source, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_OUTPUT", str(tmp_path))
    monkeypatch.setattr(PolicyServer, "run", lambda server: pytest.fail(f"{source} is served"))
    assert cli.main(["serve", source, "--port", "0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lara: serve: ")
    assert message in error


def test_a_missing_checkpoint_is_an_error_in_python_too(tmp_path):
    with pytest.raises(PolicySourceError):
        open_served(tmp_path / "no policy")


def test_the_token_is_in_a_file_or_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LARA_API_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("LARA_API_TOKEN", "from the environment")
    assert read_token(None) == "from the environment"
    (tmp_path / "token").write_text("from the file\n")
    assert read_token(tmp_path / "token") == "from the file"
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "absent"):
        with pytest.raises(LaraArgumentError, match="token_file"):
            read_token(tmp_path / name)


@pytest.mark.slow
def test_a_policy_post_trained_with_lara_is_served_by_a_process_that_holds_no_lara(tmp_path):
    """The demo's policy: trained for a step with LARA, saved as the demo saves it, served by the command."""
    from examples.mini_vla import MiniVLA
    from examples.served_policies import ServedMiniVLA

    policy = MiniVLA().train()
    lara = attach_lara(policy, OwnLam())
    frames = make_batch()["lara_frames"]
    size, config = len(frames), policy.config
    policy(
        {
            "image": torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8), "state": torch.randn(size, 4),
            "task": torch.zeros(size, dtype=torch.long), "action": torch.randn(size, config.horizon, 4),
            "action_mask": torch.ones(size, config.horizon, 4), "lara_frames": frames,
        }
    )["loss"].backward()  # fmt: skip
    torch.optim.AdamW(policy.parameters(), lr=1e-3).step()
    assert any("lara" in name for name in policy.state_dict())
    lara.detach()
    folder = tmp_path / "cache" / "policy-lara_cosine-0123456789"
    folder.mkdir(parents=True)
    torch.save(policy.state_dict(), folder / "policy.pt")
    observation = {
        "video": {"front": np.random.default_rng(0).integers(0, 255, (1, 1, 64, 64, 3), dtype=np.uint8)},
        "state": {"state": np.float32([[[0.1, 0.6, 0.2, 1.0]]])},
        "language": {"task": [["drawer open"]]},
    }
    expected = ServedMiniVLA(policy).get_action(observation, {"seed": 9})["action"].detach().numpy()

    program = """
import sys
for name in ("lam", "adapter", "attach", "projector", "losses", "tap"):
    sys.modules[f"lara_adapter.{name}"] = None  # importing it would raise
from lara_adapter import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", program, "serve", f"{POLICIES}:lara_cosine", "--port", "0", "--allow-kill"],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "DEMO_OUTPUT": str(tmp_path), "LARA_API_TOKEN": "secret",
             "OMP_NUM_THREADS": "1"},  # as here: another number of threads rounds otherwise
    )  # fmt: skip
    try:
        port = int(child.stdout.readline().rpartition(":")[2])
        with PolicyClient(port=port, timeout_ms=30_000) as stranger:
            assert not stranger.ping()
        with PolicyClient(port=port, timeout_ms=30_000, api_token="secret") as client:
            action = client.get_action(observation, {"seed": 9})[0]["action"]
            client.kill_server()
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()
    assert np.array_equal(action, expected)
