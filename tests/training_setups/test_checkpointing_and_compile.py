"""Gradients in every combination of checkpointing, tap kind and compile equal the plain eager ones, or it says why not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.models import FixedDit, build
from helpers.toys import OwnLam, gradients, make_batch

from lara_adapter import AttachOrderError, TapNeverFired, attach_lara

CHECKPOINTING = [None, "non-reentrant", "reentrant"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_gradients(kind, **arguments):
    policy, _ = build(kind, **arguments)
    policy(make_batch())["loss"].backward()
    return gradients(policy)


def assert_equal(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            assert torch.allclose(other, gradient, atol=atol), name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["output", "norm"])
@pytest.mark.parametrize("layer", [-1, -3])
def test_eager(kind, checkpointing, layer):
    policy, lara = build(kind, layer=layer)
    policy.checkpointing = checkpointing
    # with the inputs' graph: reentrant checkpointing needs an input that requires grad, as hosts arrange
    policy(make_batch())["loss"].backward()
    assert_equal(gradients(policy), plain_gradients(kind, layer=layer))
    # the recomputation in backward did not leave a second capture behind
    assert lara.binding._captured == ()


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kind", ["output", "norm"])
def test_the_recomputation_never_changes_what_was_captured(kind, early_stop, monkeypatch):
    policy, lara = build(kind)
    policy.checkpointing = "non-reentrant"
    fired = []
    hook = "capture_output" if kind == "output" else "capture_input"
    tapped = policy.get_submodule(lara.config.tap)
    register = tapped.register_forward_hook if kind == "output" else tapped.register_forward_pre_hook
    register(lambda *a: fired.append(lara.binding._armed))
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        policy(make_batch())["loss"].backward()
    assert fired[0] is True
    assert not any(fired[1:]), f"{hook} was armed in backward"
    if not early_stop or kind == "norm":
        assert len(fired) > 1  # it did fire again
    assert_equal(gradients(policy), plain_gradients(kind))


def test_reentrant_checkpointing_without_an_input_that_requires_grad_is_refused():
    """All parameters before the blocks frozen: reentrant checkpointing cuts the graph, and LARA says so."""
    policy, _ = build("output")
    for module in (policy.state_in, policy.action_in):
        module.requires_grad_(False)
    policy.position.requires_grad_(False)
    policy.checkpointing = "reentrant"
    with pytest.raises(Exception, match="use_reentrant=False"), pytest.warns(UserWarning, match="None of the inputs"):
        policy(make_batch())


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["output", "norm"])
def test_compiled_with_checkpointing(kind, checkpointing):
    """Without fullgraph torch breaks the graph around a checkpointed region that holds a hook, and is right."""
    policy, _ = build(kind)
    policy.checkpointing = checkpointing
    torch.compile(policy, backend="aot_eager")(make_batch())["loss"].backward()
    assert_equal(gradients(policy), plain_gradients(kind), atol=1e-5)


@pytest.mark.parametrize("kind", ["output", "norm"])
def test_fullgraph_with_checkpointing_needs_torchs_own_switch(kind):
    """A hook's store inside a checkpointed region is a side effect, which torch refuses to trace in one graph. Newer
    versions have a switch for side effects that the recomputation need not repeat; LARA's is one."""
    policy, _ = build(kind)
    policy.checkpointing = "non-reentrant"
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(make_batch())
    switch = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if not hasattr(torch._dynamo.config, switch):
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(switch, True):
        compiled(make_batch())["loss"].backward()
    assert_equal(gradients(policy), plain_gradients(kind), atol=1e-5)


@pytest.mark.parametrize("lam", ["own", pytest.param("tiny", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["output", "norm"])
def test_compiled_whole_fullgraph(kind, lam):
    expected = plain_gradients(kind, lam=lam)
    policy, lara = build(kind, lam=lam)
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True)
    compiled(make_batch())["loss"].backward()
    assert_equal(gradients(policy), expected, atol=1e-5)
    assert lara.step == 1
    compiled(make_batch(seed=1))["loss"].backward()
    assert lara.metrics()["total"] == pytest.approx(
        0.3 * lara.metrics()["align_loss"] + 0.2 * lara.metrics()["lam_loss"], rel=1e-4
    )


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_compiled_with_frozen_lam_and_both_alignments(alignment):
    arguments = {"alignment": alignment, "train_lam": False, "lam": "tiny"}
    expected = plain_gradients("output", **arguments)
    policy, _ = build("output", **arguments)
    torch.compile(policy, backend="aot_eager", fullgraph=True)(make_batch())["loss"].backward()
    assert_equal(gradients(policy), expected, atol=1e-5)


def test_compiled_in_place_and_by_blocks():
    expected = plain_gradients("output")
    policy, _ = build("output")
    policy.compile(backend="aot_eager", fullgraph=True)
    policy(make_batch())["loss"].backward()
    assert_equal(gradients(policy), expected, atol=1e-5)
    policy, _ = build("output")
    for block in policy.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    policy(make_batch())["loss"].backward()
    assert_equal(gradients(policy), expected, atol=1e-5)


def test_blocks_compiled_before_attaching_but_not_run_work():
    torch.manual_seed(0)
    policy = FixedDit().train()
    for block in policy.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.2)
    policy(make_batch())["loss"].backward()
    assert_equal(gradients(policy), plain_gradients("output"), atol=1e-5)


def test_attaching_to_a_compiled_policy_is_refused():
    policy = FixedDit().train()
    with pytest.raises(AttachOrderError, match=r"then torch\.compile"):
        attach_lara(torch.compile(policy, backend="aot_eager"), OwnLam())
    policy.compile(backend="aot_eager")
    with pytest.raises(AttachOrderError, match=r"policy\.compile\(\) was called already"):
        attach_lara(policy, OwnLam())


def test_blocks_compiled_and_run_before_attaching_never_fail_silently():
    """pytorch#117758: a hook added after the first compiled call may be ignored. Either it fires, or it is an error."""
    torch.manual_seed(0)
    policy = FixedDit().train()
    for block in policy.transformer_blocks:
        block.compile(backend="aot_eager")
    policy(make_batch())["loss"].backward()
    policy.zero_grad()
    attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.2)
    with contextlib.suppress(TapNeverFired):
        policy(make_batch())["loss"].backward()
        assert policy.lara.projector[0].weight.grad.any()


def test_hosts_that_compile_their_forward_at_construction():
    """LeRobot's pi0 sets self.forward = torch.compile(self.forward) on the inner model."""

    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = FixedDit()
            self.model.forward = torch.compile(self.model.forward, backend="aot_eager")

        def forward(self, batch):
            return self.model.forward({k: v for k, v in batch.items()})

    torch.manual_seed(0)
    policy = Host().train()
    lara = attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.2)
    policy(make_batch())["loss"].backward()
    expected = plain_gradients("output")
    assert_equal(
        {n: g for n, g in gradients(policy.model).items()}, {n: g for n, g in expected.items() if "lara" not in n}
    )
    lara.detach()


def test_detach_after_compile_restores_the_plain_policy():
    policy, lara = build("output")
    compiled = torch.compile(policy, backend="aot_eager")
    compiled(make_batch())["loss"].backward()
    lara.detach()
    torch._dynamo.reset()
    policy.zero_grad()
    batch = make_batch()
    del batch["lara_frames"]
    loss = torch.compile(policy, backend="aot_eager", fullgraph=True)(batch)["loss"]
    assert torch.allclose(loss, policy(batch)["loss"])
