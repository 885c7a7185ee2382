"""What policies of LeRobot are saved to and loaded from while LARA is attached, with LeRobot's own loading code."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")

from helpers.lerobot_tiny import POLICIES, make_batch, make_policy
from helpers.toys import OwnLam
from lara_adapter.integrations.checkpoints import find_adapter
from lara_adapter.integrations.lerobot import stock_saves
from lara_adapter.integrations.lerobot.checkpoints import DataSettings, save_beside
from safetensors.torch import load_file

from lara_adapter import (
    AdapterFormatError,
    LaraAdapter,
    LatentActionConfig,
    LatentActionModel,
    OptimizerCoverageError,
    attach_lara,
    load_lara,
    policies,
)
from lara_adapter.check import check_optimizer
from lara_adapter.policies import find_spec

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
every_policy = pytest.mark.parametrize("name", list(POLICIES))
DATA = DataSettings(("observation.images.cam",), 8, (32, 32))


def own_optimizer(policy: nn.Module) -> torch.optim.Optimizer:
    """As lerobot-train makes it."""
    return policy.config.get_optimizer_preset().build(policy.get_optim_params())


def tiny_lam() -> LatentActionModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LatentActionModel(LatentActionConfig.tiny(image_size=16, queries=2, latent_dim=4, fdm_layers=1))


def train_step(policy: nn.Module, optimizer: torch.optim.Optimizer, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    loss, _ = policy.forward(make_batch(name, seed=seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def stock_load(name: str, folder: Path, **arguments) -> nn.Module:
    """LeRobot's from_pretrained, with its remapping of keys; only the building of the tiny policy is ours."""
    blank = make_policy(name)
    for parameter in blank.parameters():
        parameter.data.zero_()

    class Loaded(type(blank)):
        def __init__(self, config, **kwargs) -> None:
            self.__dict__ = blank.__dict__

    return Loaded.from_pretrained(folder, config=blank.config, **arguments)


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_policy
def test_a_saved_policy_is_the_one_that_was_never_attached(name, tmp_path):
    """The same file, byte for byte, while LARA is attached and goes on training; stock LeRobot loads it strictly."""
    policy = make_policy(name)
    policy.save_pretrained(tmp_path / "never")
    lara = attach_lara(policy, OwnLam())
    stock_saves(lara)
    order = [key for key, _ in policy.named_parameters()]
    policy.save_pretrained(tmp_path / "attached")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "attached" / file).read_bytes() == (tmp_path / "never" / file).read_bytes()
    assert [key for key, _ in policy.named_parameters()] == order
    train_step(policy, own_optimizer(policy), name, seed=1)
    policy.save_pretrained(tmp_path / "trained")
    loaded = stock_load(name, tmp_path / "trained", strict=True)
    lara.detach()
    assert equal(loaded, policy)
    assert not equal(loaded, make_policy(name))
    policy.save_pretrained(tmp_path / "detached")
    assert "_save_pretrained" not in policy.__dict__
    assert (tmp_path / "detached/model.safetensors").read_bytes() == (
        tmp_path / "trained/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("name", ["groot", "xvla"])
def test_without_stock_saves_a_strict_host_refuses_the_file(name, tmp_path):
    """Why the checkpoints are kept clean."""
    policy = make_policy(name)
    attach_lara(policy, OwnLam())
    policy.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="lara"):
        stock_load(name, tmp_path)


@every_policy
def test_a_state_dict_that_was_gathered_elsewhere_is_cleaned_too(name, tmp_path):
    policy = make_policy(name)
    lara = attach_lara(policy, OwnLam())
    stock_saves(lara)
    state = policy.state_dict()
    assert any("lara." in key for key in state)
    policy.save_pretrained(tmp_path, state_dict=state)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "lara" in key]
    assert any("lara." in key for key in state)
    lara.detach()
    assert equal(stock_load(name, tmp_path, strict=True), policy)


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_pi_renames_keys_and_lara_survives_it(name):
    """Its loading puts `model.` before every key that lacks it: a module anywhere else would never be restored."""
    policy, other = make_policy(name), make_policy(name)
    for p, seed in ((policy, 1), (other, 2)):
        torch.manual_seed(seed)
        attach_lara(p, OwnLam())
    state = policy.state_dict()
    renamed = type(policy)._fix_pytorch_state_dict_keys(policy, dict(state), policy.config)
    renamed = {key if key.startswith("model.") else f"model.{key}": value for key, value in renamed.items()}
    assert renamed.keys() == state.keys()
    assert [key for key in state if ".lara." in key]
    assert not equal(policy, other)
    other.load_state_dict(renamed, strict=True)
    assert equal(policy, other)


@every_policy
def test_lerobots_own_optimizer_trains_lara(name):
    policy = make_policy(name)
    lara = attach_lara(policy, OwnLam())
    optimizer = own_optimizer(policy)
    assert check_optimizer(lara, optimizer)
    before = {key: p.detach().clone() for key, p in lara.named_parameters()}
    train_step(policy, optimizer, name, seed=1)
    train_step(policy, optimizer, name, seed=2)
    after = dict(lara.named_parameters())
    assert [key for key in before if key.startswith("projector") and not torch.equal(before[key], after[key])]
    assert [key for key in before if key.startswith("lam") and not torch.equal(before[key], after[key])]


def test_vla_jepa_would_leave_out_an_adapter_elsewhere(monkeypatch):
    """Its get_optim_params() gives policy.model alone; without the table's owner= nothing of LARA would be trained."""
    import dataclasses

    policy = make_policy("vla_jepa")
    row = dataclasses.replace(find_spec(policy), owner="")
    monkeypatch.setattr(policies, "_TABLE", [row, *policies._TABLE])
    with pytest.raises(OptimizerCoverageError, match="lacks"):
        check_optimizer(attach_lara(policy, OwnLam()), own_optimizer(policy))


@every_policy
def test_save_and_go_on(name, tmp_path):
    """policy + lara/ + LeRobot's optimizer state, by position: the next step is that of the run that went on."""
    from lerobot.optim import load_optimizer_state, save_optimizer_state

    policy = make_policy(name)
    torch.manual_seed(5)
    lara = attach_lara(policy, tiny_lam(), align_weight=0.5, lam_weight=0.5, layer=-2)
    stock_saves(lara)
    optimizer = own_optimizer(policy)
    train_step(policy, optimizer, name, seed=1)
    policy.save_pretrained(tmp_path)
    save_beside(lara, tmp_path, DATA)
    (tmp_path / "state").mkdir()
    save_optimizer_state(optimizer, tmp_path / "state")

    again = stock_load(name, tmp_path)
    again.train()
    resumed = load_lara(again, find_adapter(tmp_path))
    assert (resumed.step, resumed.config.layer) == (1, lara.config.layer)
    second = load_optimizer_state(own_optimizer(again), tmp_path / "state")
    for p, o in ((policy, optimizer), (again, second)):
        train_step(p, o, name, seed=2)
    assert equal(policy, again)
    assert DataSettings.read(find_adapter(tmp_path)) == DATA


def test_a_run_without_lara_has_another_optimizer_state(tmp_path):
    from lerobot.optim import load_optimizer_state, save_optimizer_state

    policy = make_policy("smolvla")
    optimizer = own_optimizer(policy)
    save_optimizer_state(optimizer, tmp_path)
    attach_lara(policy, OwnLam())
    with pytest.raises(ValueError, match="mismatch"):
        load_optimizer_state(own_optimizer(policy), tmp_path)


def test_parameters_keep_their_order(tmp_path):
    """The optimizer's state is stored by position, and something may be registered after LARA."""
    policy = make_policy("smolvla")
    stock_saves(attach_lara(policy, OwnLam()))
    policy.later = nn.Linear(1, 1)
    order = [key for key, _ in policy.named_parameters()]
    policy.save_pretrained(tmp_path)
    assert [key for key, _ in policy.named_parameters()] == order
    assert order[-1] == "later.bias"


def test_a_deep_copy_saves_itself(tmp_path):
    """EMA: what the copy writes are the copy's weights."""
    policy = make_policy("multi_task_dit")
    stock_saves(attach_lara(policy, OwnLam()))
    double = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.add_(1)
    double.save_pretrained(tmp_path)
    assert isinstance(double.lara, LaraAdapter)
    double.lara.detach()
    assert equal(stock_load("multi_task_dit", tmp_path, strict=True), double)


def test_data_settings_of_the_previous_release_are_read(tmp_path):
    (tmp_path / "lerobot.json").write_text(
        '{"schema_version": 1, "cameras": ["observation.images.cam"], "horizon": 8, "size": [32, 32]}'
    )
    assert DataSettings.read(tmp_path) == DATA


def test_damaged_data_settings(tmp_path):
    assert find_adapter(tmp_path) is None
    with pytest.raises(AdapterFormatError, match="missing"):
        DataSettings.read(tmp_path)
    for text, match in (
        ('{"schema_version": 2}', "schema_version=2"),
        ('{"schema_version": 1, "horizon": 3}', "holds"),
    ):
        (tmp_path / "lerobot.json").write_text(text)
        with pytest.raises(AdapterFormatError, match=match):
            DataSettings.read(tmp_path)
