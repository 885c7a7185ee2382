"""accelerate: prepare, accumulate, mixed precision, save_state and load_state, unwrap_model."""

from __future__ import annotations

import pytest
import torch
from helpers.models import build
from helpers.toys import gradients, make_batch

from lara_adapter import AttachOrderError, attach_lara

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state():
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def accelerator_of(**arguments):
    return accelerate.Accelerator(cpu=True, **arguments)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_loop_trains_projector_and_lam(precision):
    policy, lara = build(lam="tiny")
    accelerator = accelerator_of(mixed_precision=precision)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(policy, optimizer)
    before = {n: p.clone() for n, p in lara.named_parameters()}
    for step in range(4):
        loss = model(make_batch(seed=step))["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for p in lara.parameters()} == {torch.float32}
    assert all(not torch.equal(before[n], p) for n, p in lara.named_parameters() if "quantizer" not in n)
    assert lara.losses.total.dtype == torch.float32


def test_bf16_loss_is_close_to_float32():
    losses = []
    for precision in ("no", "bf16"):
        accelerate.state.AcceleratorState._reset_state(True)
        policy, lara = build()
        model = accelerator_of(mixed_precision=precision).prepare(policy)
        model(make_batch())
        losses.append(lara.losses.total.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_accumulate_equals_one_large_step():
    policy, _ = build()
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    model, prepared = accelerator.prepare(policy, optimizer)
    batches = [make_batch(seed=1), make_batch(seed=2)]
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch)["loss"])
    found = gradients(policy)
    prepared.zero_grad()
    reference, _ = build()
    for batch in batches:
        (reference(batch)["loss"] / 2).backward()
    for name, gradient in gradients(reference).items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_attaching_after_prepare_is_refused_with_the_order():
    from helpers.models import FixedDit
    from helpers.toys import OwnLam

    policy = accelerator_of(mixed_precision="bf16").prepare(FixedDit())
    with pytest.raises(AttachOrderError, match=r"order: attach_lara, optimizer, accelerator\.prepare"):
        attach_lara(policy, OwnLam())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_unwrap_model_keeps_lara(precision, keep):
    """accelerate unwraps along __wrapped__; LARA's entry has none, or it would be stripped with the autocast."""
    policy, lara = build()
    accelerator = accelerator_of(mixed_precision=precision)
    model = accelerator.prepare(policy)
    model(make_batch())
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    assert unwrapped is policy
    step = lara.step
    unwrapped(make_batch())["loss"].backward()
    assert lara.step == step + 1
    if precision == "no" or not keep:
        lara.detach()
        assert "forward" not in policy.__dict__ or "lara" not in policy.forward.__func__.__module__


def test_save_state_and_load_state_continue_bit_identically(tmp_path):
    def start():
        accelerate.state.AcceleratorState._reset_state(True)
        policy, lara = build(lam="tiny")
        accelerator = accelerator_of()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(policy, optimizer)
        return accelerator, model, optimizer, lara

    def steps(accelerator, model, optimizer, numbers):
        for step in numbers:
            optimizer.zero_grad()
            accelerator.backward(model(make_batch(seed=step))["loss"])
            optimizer.step()

    whole = start()
    steps(*whole[:3], range(3))
    whole[0].save_state(str(tmp_path / "state"))
    steps(*whole[:3], range(3, 6))
    resumed = start()
    resumed[0].load_state(str(tmp_path / "state"))
    assert resumed[3].step == 3
    steps(*resumed[:3], range(3, 6))
    expected, found = whole[1].state_dict(), resumed[1].state_dict()
    assert all(torch.equal(v, found[k]) for k, v in expected.items())
