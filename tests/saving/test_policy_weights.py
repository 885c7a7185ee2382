"""What was trained of the policy: saved beside the adapter, put back to train on or to act."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers.toys import DitPolicy
from helpers.trained import TARGETS, Host, build, lara_on, optimizer_of, train
from torch import nn

from lara_adapter import (
    AdapterFormatError,
    AttachOrderError,
    LaraArgumentError,
    load_lara,
)
from lara_adapter.storage.files import read_tensors


def act(policy):
    torch.manual_seed(5)
    return policy.eval().get_action(torch.linspace(-1, 1, 6).reshape(3, 2))


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_run_goes_on_bit_identically_from_what_was_saved(tmp_path, with_lora):
    """Six steps at one go, against three, everything thrown away but the folder and the optimizer's state, and three."""
    lora = None
    if with_lora:
        lora = pytest.importorskip("peft").LoraConfig(target_modules=TARGETS, r=2, lora_dropout=0.1)
    whole = build(lora=lora)
    torch.manual_seed(1)
    lara_on(whole)
    first_part = copy.deepcopy(whole)
    expected = train(whole, optimizer_of(whole), range(6))

    optimizer = optimizer_of(first_part)
    assert train(first_part, optimizer, range(3)) == expected[:3]
    lara = next(m for m in first_part.modules() if type(m).__name__ == "LaraAdapter")
    lara.save_pretrained(tmp_path / "a", save_policy="trainable")
    state = copy.deepcopy(optimizer.state_dict())
    del first_part, optimizer, lara

    again = build(seed=0)
    if with_lora:
        from peft import PeftModel

        again = PeftModel.from_pretrained(again, tmp_path / "a" / "policy_lora", is_trainable=True)
    load_lara(again.train(), tmp_path / "a")
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(state)
    assert train(again, optimizer, range(3, 6)) == expected[3:]
    ours, theirs = again.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert different == []
    assert any("quantizer.usage" in name for name in ours)


# ---------------------------------------------------------------------- acting, with trained weights


@pytest.fixture
def trained(tmp_path):
    policy = build()
    lara = lara_on(policy)
    train(policy, optimizer_of(policy), range(3))
    lara.save_pretrained(tmp_path / "a", save_policy="trainable", max_shard_size=4000)
    return policy, lara, tmp_path / "a"


def test_acting_with_trained_weights(trained):
    policy, _, folder = trained
    base = build()
    different = act(base)
    acting = load_lara(base, folder, inference=True)
    assert acting is base
    assert not acting.training
    assert torch.equal(act(acting), act(policy))
    assert not torch.equal(act(acting), different)
    assert acting.state_dict().keys() == Host().state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in acting.modules())
    assert "forward" not in acting.__dict__
    assert acting.state_again.weight is acting.state_in.weight


def test_what_is_stored_and_what_not(trained):
    policy, _, folder = trained
    index = json.loads((folder / "policy_weights" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all((folder / "policy_weights" / name).is_file() for name in files)
    names = set(index["weight_map"])
    assert "norm_state.running_mean" in names
    assert "bound" in names
    assert not names & {"frozen.weight", "scratch", "state_again.weight"}
    assert not any("lara" in name for name in names)
    assert index["ties"] == {"state_again.weight": "state_in.weight"}
    listed = json.loads((folder / "lara_config.json").read_text())["files"]
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(listed) == there - {"lara_config.json", "README.md"}
    own = policy.state_dict()
    for name in files:
        for key, tensor in read_tensors(folder / "policy_weights" / name).items():
            assert torch.equal(tensor, own[key])


def test_the_dtype_is_kept(tmp_path):
    policy = build()
    policy.action_out.to(torch.bfloat16)
    lara_on(policy).save_pretrained(tmp_path / "a", save_policy="trainable")
    stored = read_tensors(tmp_path / "a" / "policy_weights" / "model.safetensors")
    assert stored["action_out.weight"].dtype == torch.bfloat16
    assert stored["action_in.weight"].dtype == torch.float32


def test_saving_without_the_policy_leaves_no_old_weights_behind(trained):
    _, lara, folder = trained
    (folder / "notes").mkdir()
    (folder / "notes" / "mine").write_text("keep")
    lara.save_pretrained(folder)
    assert not (folder / "policy_weights").exists()
    assert (folder / "notes" / "mine").read_text() == "keep"


class Narrow(Host):
    def __init__(self) -> None:
        super().__init__()
        self.action_in = nn.Linear(4, 16, bias=False)


class Wide(Host):
    def __init__(self) -> None:
        super().__init__()
        self.action_out = nn.Linear(16, 4)


@pytest.mark.parametrize(("kind", "said"), [(Narrow, "has no .*action_in.bias"), (Wide, "action_out.bias has shape")])
def test_another_base_is_refused_and_left_as_it_was(trained, kind, said):
    _, _, folder = trained
    for arguments in ({"inference": True}, {}):
        other = build(kind)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(AdapterFormatError, match=said):
            load_lara(other, folder, **arguments)
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())


def test_a_base_of_another_class_is_told(trained, caplog):
    _, _, folder = trained

    class Other(Host):
        pass

    load_lara(Other(), folder, inference=True)
    assert "saved from a Host, but is loaded into a Other" in caplog.text


def test_a_folder_without_anything_of_the_policy(tmp_path):
    policy = build()
    lara_on(policy).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="to act, load the policy alone"):
        load_lara(build(), tmp_path / "a", inference=True)


def test_arguments_that_do_not_go_together(trained):
    policy, lara, folder = trained
    with pytest.raises(LaraArgumentError, match="inference=True"):
        load_lara(build(), folder, inference=True, token="last")
    with pytest.raises(LaraArgumentError, match="merge=True needs inference"):
        load_lara(build(), folder, merge=True)
    with pytest.raises(AttachOrderError, match="has LARA already"):
        load_lara(policy, folder, inference=True)
    with pytest.raises(LaraArgumentError, match="save_policy='all'"):
        lara.save_pretrained(folder, save_policy="all")


def test_acting_loads_no_latent_action_model(trained):
    """In a process of its own: neither the LAM's files nor transformers nor a hook is touched; lam/ may even be gone."""
    _, _, folder = trained
    for path in (folder / "lam").iterdir():
        path.unlink()
    (folder / "lara_adapter.safetensors").unlink()
    code = f"""
import sys
for name in ("transformers", "peft", "accelerate", "matplotlib"):
    sys.modules[name] = None
sys.path[:0] = {[p for p in sys.path if p]!r}
from helpers.trained import build
from lara_adapter import load_lara, lam
lam.LatentActionModel.from_pretrained = None
policy = load_lara(build(), {str(folder)!r}, inference=True)
assert not any("lara" in name for name, _ in policy.named_modules())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- acting, with LoRA


@pytest.fixture
def with_lora(tmp_path):
    peft = pytest.importorskip("peft")
    policy = build(DitPolicy, peft.LoraConfig(target_modules=TARGETS, r=2, modules_to_save=["action_out"]))
    lara = lara_on(policy)
    train(policy, optimizer_of(policy), range(3))
    lara.save_pretrained(tmp_path / "a")
    lara.detach()
    return policy, tmp_path / "a"


@pytest.mark.parametrize("merge", [False, True])
def test_acting_with_lora(with_lora, merge):
    trained_policy, folder = with_lora
    base = build(DitPolicy)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    different, state = act(base), torch.get_rng_state()
    torch.set_rng_state(state)
    acting = load_lara(base, folder, inference=True, merge=merge)
    assert torch.equal(torch.get_rng_state(), state)
    assert acting is base
    assert type(acting) is DitPolicy
    assert not acting.training
    assert torch.allclose(act(acting), act(trained_policy), atol=1e-6)
    assert not torch.allclose(act(acting), different, atol=1e-4)
    assert "forward" not in acting.__dict__
    plain = acting.state_dict().keys() == DitPolicy().state_dict().keys()
    assert plain is merge
    if merge:
        assert "peft_config" not in acting.__dict__
        assert {name: p.requires_grad for name, p in acting.named_parameters()} == flags


def test_a_wrapped_policy_receives_the_lora(with_lora):
    peft = pytest.importorskip("peft")
    trained_policy, folder = with_lora
    wrapped = build(DitPolicy, peft.LoraConfig(target_modules=TARGETS, r=2, modules_to_save=["action_out"]))
    assert load_lara(wrapped, folder, inference=True) is wrapped
    assert torch.equal(act(wrapped), act(trained_policy))
    merged = load_lara(wrapped, folder, inference=True, merge=True)
    assert type(merged) is DitPolicy
    assert torch.allclose(act(merged), act(trained_policy), atol=1e-6)


def test_the_folder_of_lora_tells_no_path_and_peft_reads_it(with_lora):
    from peft import PeftModel

    trained_policy, folder = with_lora
    assert sorted(p.name for p in (folder / "policy_lora").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads((folder / "policy_lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert config["auto_mapping"] is None
    again = PeftModel.from_pretrained(build(DitPolicy), folder / "policy_lora")
    assert torch.allclose(act(again), act(trained_policy), atol=1e-6)


def test_lora_of_another_policy_is_refused_and_the_base_left_as_it_was(with_lora):
    _, folder = with_lora
    for other, said in ((DitPolicy(width=24), "does not fit|has shape"), (DitPolicy(depth=3), "has no")):
        names, before = set(other.state_dict()), copy.deepcopy(other.state_dict())
        flags = {name: p.requires_grad for name, p in other.named_parameters()}
        with pytest.raises(AdapterFormatError, match=said):
            load_lara(other, folder, inference=True)
        assert set(other.state_dict()) == names
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert {name: p.requires_grad for name, p in other.named_parameters()} == flags
        assert "peft_config" not in other.__dict__


def test_lora_and_trained_weights_together(tmp_path):
    """Of a PeftModel, `trainable` is what was unfrozen beside the LoRA, by the names that the bare policy has."""
    peft = pytest.importorskip("peft")
    policy = build(Host, peft.LoraConfig(target_modules=TARGETS, r=2))
    for name, parameter in policy.named_parameters():
        if "action_in" in name or "blocks.4.mlp.2.base_layer" in name:
            parameter.requires_grad_(True)
    lara = lara_on(policy)
    train(policy, optimizer_of(policy), range(2))
    lara.save_pretrained(tmp_path / "a", save_policy="trainable")
    lara.detach()
    names = set(read_tensors(tmp_path / "a" / "policy_weights" / "model.safetensors"))
    assert {"action_in.weight", "transformer_blocks.4.mlp.2.weight"} <= names
    assert not any("lora" in name or "base_layer" in name for name in names)
    for merge in (False, True):
        acting = load_lara(build(Host), tmp_path / "a", inference=True, merge=merge)
        assert torch.allclose(act(acting), act(policy), atol=1e-6), merge


def test_lora_with_a_name_of_its_own_and_ranks_per_module(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=r".*\.mlp\.(0|2)", r=2, rank_pattern={"transformer_blocks.1.mlp.0": 3}, use_rslora=True,
        alpha_pattern={"transformer_blocks.1.mlp.0": 5}, init_lora_weights=False,
    )  # fmt: skip
    policy = peft.get_peft_model(DitPolicy(), config, adapter_name="mine").train()
    lara = lara_on(policy)
    lara.save_pretrained(tmp_path / "a")
    lara.detach()
    assert torch.equal(act(load_lara(build(DitPolicy), tmp_path / "a", inference=True)), act(policy))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_of_lora_with_biases_only_the_policys_are_saved(bias, tmp_path, caplog):
    """peft takes every bias below the PeftModel, and LARA is there too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=TARGETS, r=2, bias=bias, modules_to_save=["action_out"])

    def wrap():
        return build(DitPolicy, copy.deepcopy(config))

    policy = wrap()
    lara = lara_on(policy)
    train(policy, optimizer_of(policy), range(3))
    lara.save_pretrained(tmp_path / "a")
    names = set(read_tensors(tmp_path / "a" / "policy_lora" / "adapter_model.safetensors"))
    biases = {name for name in names if name.endswith(".bias") and "action_out" not in name}
    assert {name.split(".")[2] for name in names} <= {name.split(".")[0] for name in DitPolicy().state_dict()}
    assert bool(biases) or bias == "lora_only"
    expected = {n: t for n, t in policy.state_dict().items() if ".lara." not in n}
    # to act
    lara.detach()
    for merge in (False, True):
        acting = load_lara(build(DitPolicy), tmp_path / "a", inference=True, merge=merge)
        assert torch.allclose(act(acting), act(policy), atol=1e-6), merge
    # to go on with training
    again = wrap()
    assert load_lara(again, tmp_path / "a").step == 3
    assert "no LARA weights" not in caplog.text
    found = again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
