"""`open_policy` and the skeleton it builds; the hosts' own code is in tests/hosts/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.toys import DitPolicy
from lara_adapter.integrations import loading
from lara_adapter.integrations.loading import open_policy
from lara_adapter.integrations.skeleton import skeleton
from torch import nn

from lara_adapter import HostNotInstalled, PolicySourceError

# ---------------------------------------------------------------------- functions


@pytest.fixture(autouse=True)
def _path_of_imports(monkeypatch):
    """Folders of this test's files must not be searched by the processes of later ones."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("number", "is of type int, but a callable"),
        ("nothing", "returned NoneType"),
        ("fails", "ZeroDivisionError: by zero"),
        ("missing", "has no 'missing'"),
    ],
)
def test_functions_that_are_none_or_fail(tmp_path, name, said):
    file = tmp_path / f"factory_{name}.py"
    file.write_text("number = 3\ndef nothing(): pass\ndef fails(): raise ZeroDivisionError('by zero')\n")
    with pytest.raises(PolicySourceError, match=said):
        open_policy(f"{file}:{name}")


def test_files_that_are_none_or_clash(tmp_path):
    with pytest.raises(PolicySourceError, match=r"absent_file.py does not exist"):
        open_policy(f"{tmp_path / 'absent_file.py'}:make")
    (tmp_path / "json.py").write_text("make = None")
    with pytest.raises(PolicySourceError, match=r"json.py is a file: name the function"):
        open_policy(tmp_path / "json.py")
    with pytest.raises(PolicySourceError, match="imported already"):
        open_policy(f"{tmp_path / 'json.py'}:make")
    (tmp_path / "broken_file.py").write_text("raise KeyError('x')")
    with pytest.raises(PolicySourceError, match="KeyError"):
        open_policy(f"{tmp_path / 'broken_file.py'}:make")
    assert "broken_file" not in sys.modules


def test_modules_and_files_with_neighbours(tmp_path, monkeypatch):
    assert isinstance(open_policy("helpers.toys:DitPolicy"), DitPolicy)
    (tmp_path / "a_neighbour.py").write_text("from helpers.toys import DitPolicy as Policy")
    (tmp_path / "a_factory.py").write_text("import a_neighbour\nclass Zoo:\n    Policy = a_neighbour.Policy\n")
    assert isinstance(open_policy(f"{tmp_path / 'a_factory.py'}:Zoo.Policy"), DitPolicy)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in_the_folder.py").write_text("from helpers.toys import DitPolicy\npolicy = DitPolicy()")
    assert isinstance(open_policy("in_the_folder:policy"), DitPolicy)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("config", "said"),
    [("[]", "an object is expected"), ("{", "not readable JSON"), ('{"model_type": "bert"}', "model_type='bert'")],
)
def test_configurations_that_are_none(tmp_path, config, said):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PolicySourceError, match=said):
        open_policy(tmp_path)


@pytest.mark.parametrize(
    ("config", "package"), [({"model_type": "Gr00tN1d6"}, "gr00t"), ({"type": "pi05"}, "lerobot")], ids=str
)
@pytest.mark.parametrize("weights", [False, True])
def test_a_host_that_is_not_installed(tmp_path, monkeypatch, config, package, weights):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HostNotInstalled, match=f"tested with|{package}"):
        open_policy(tmp_path, weights=weights)


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def offline(repo, name):
        assert (repo, name) == ("user/policy", "config.json")
        raise OSError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        PolicySourceError,
        match=r"of the Hub: cannot load .user/policy.: OSError: offline",
    ):
        open_policy("user/policy")


# ---------------------------------------------------------------------- skeleton


class Demanding(nn.Module):
    """What constructors of real policies do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = DitPolicy(depth=2)
        self.noise = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))  # checks its arguments
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("scale", torch.ones(2))
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.to("cpu", torch.float64)
        self.to(device="cpu")
        self.body.cpu()


def test_a_skeleton_has_shapes_flags_and_no_memory():
    with skeleton():
        policy = Demanding()
    real = Demanding()
    assert all(p.is_meta for p in policy.parameters())
    described = {n: (p.shape, p.dtype, p.requires_grad) for n, p in policy.named_parameters()}
    assert described == {n: (p.shape, p.dtype, p.requires_grad) for n, p in real.named_parameters()}
    assert policy.tied.weight is policy.head.weight
    assert not policy.scale.is_meta
    assert not nn.Linear(2, 2).weight.is_meta  # afterwards all is as before


def test_a_skeleton_leaves_nothing_behind_after_a_failure():
    with pytest.raises(RuntimeError), skeleton():
        raise RuntimeError
    assert not nn.Linear(2, 2).to("cpu").weight.is_meta


def test_what_cannot_be_a_skeleton_is_built_on_the_cpu_and_that_is_said(caplog):
    class NeedsNumbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.total = self.weight.sum().item()

    policy = loading._build("toy", NeedsNumbers)
    assert not policy.weight.is_meta
    assert "random weights" in caplog.text
    with pytest.raises(PolicySourceError, match="FileNotFoundError"):
        loading._build("toy", Path("no such file").read_text)


def test_transformers_models_are_skeletons_too_and_it_is_as_before_afterwards():
    transformers = pytest.importorskip("transformers")
    before = dict(vars(transformers.PreTrainedModel))
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=16
    )
    with skeleton():
        model = transformers.ViTModel(config)
    assert all(p.is_meta for p in model.parameters())
    assert dict(vars(transformers.PreTrainedModel)) == before
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in transformers.ViTModel(config).parameters()
    )
