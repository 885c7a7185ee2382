"""peft: LoRA on the policy, LARA after it; the other order is refused; merging leaves a clean policy."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import FixedDit
from helpers.toys import OwnLam, make_batch

from lara_adapter import AttachOrderError, attach_lara

peft = pytest.importorskip("peft")

TARGETS = ["mlp.0", "mlp.2"]


def lora(policy, targets=TARGETS, **arguments):
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, **arguments)
    return peft.get_peft_model(policy, config)


def test_attach_after_lora_trains_lora_projector_and_lam():
    policy = lora(FixedDit()).train()
    lara = attach_lara(policy, OwnLam(), align_weight=0.3)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    assert lara.check(make_batch(), optimizer).ok
    policy(make_batch())["loss"].backward()
    with_gradient = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_A" in name and "transformer_blocks.0" in name for name in with_gradient)
    assert any("lara.projector" in name for name in with_gradient)
    assert any("lara.lam" in name for name in with_gradient)
    assert not any("base_layer" in name for name in with_gradient)


def test_the_tap_reads_the_state_after_lora():
    from lara_adapter import adapter as adapter_module

    seen, original = [], adapter_module.select_rows
    policy = lora(FixedDit()).train()
    attach_lara(policy, OwnLam(), layer=1)
    block, states = policy.get_base_model().transformer_blocks[0], []
    block.register_forward_hook(lambda m, a, o: states.append(o))
    try:
        adapter_module.select_rows = lambda hidden, *a, **k: (seen.append(hidden), original(hidden, *a, **k))[1]
        policy(make_batch())
    finally:
        adapter_module.select_rows = original
    assert seen[0] is states[0]
    with policy.disable_adapter(), torch.no_grad():
        policy(make_batch())
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_attach_before_lora_is_refused_with_the_right_order(targets):
    policy = FixedDit().train()
    attach_lara(policy, OwnLam())
    wrapped = lora(policy, targets)
    with pytest.raises(AttachOrderError, match=r"Order: policy = get_peft_model\(policy, \.\.\.\); lara = attach_lara"):
        wrapped(make_batch())


def test_lora_never_lands_in_lam_or_projector():
    policy = lora(FixedDit(), "all-linear")
    lara = attach_lara(policy, OwnLam())
    assert not any("lora" in name for name, _ in lara.named_parameters())
    assert all(p.requires_grad for p in lara.parameters())


def test_merge_and_unload_then_detach_leaves_the_merged_policy_clean():
    torch.manual_seed(0)
    policy = lora(FixedDit()).train()
    reference = copy.deepcopy(policy).merge_and_unload()
    lara = attach_lara(policy, OwnLam())
    policy(make_batch())["loss"].backward()
    merged = policy.merge_and_unload()
    merged.zero_grad()
    merged(make_batch())["loss"].backward()  # still trains with LARA
    assert lara.projector[0].weight.grad is not None
    lara.detach()
    assert merged.state_dict().keys() == reference.state_dict().keys() == FixedDit().state_dict().keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    assert "forward" not in merged.__dict__
    batch = make_batch()
    assert torch.equal(merged.eval()(batch)["loss"], reference.eval()(batch)["loss"])


def test_peft_saves_only_its_own(tmp_path):
    from safetensors.torch import load_file

    policy = lora(FixedDit())
    attach_lara(policy, OwnLam())
    policy.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names
    assert all("lora_" in name and "lara" not in name for name in names)
    fresh = peft.PeftModel.from_pretrained(FixedDit(), tmp_path)
    for name, parameter in fresh.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, dict(policy.named_parameters())[name])


def test_detach_under_lora_restores_flags_and_state():
    policy = lora(FixedDit())
    before = {n: p.requires_grad for n, p in policy.named_parameters()}, set(policy.state_dict())
    lara = attach_lara(policy, OwnLam(), train_lam=False)
    lara.detach()
    assert ({n: p.requires_grad for n, p in policy.named_parameters()}, set(policy.state_dict())) == before
