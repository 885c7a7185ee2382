import copy

import pytest
import torch
from helpers.toys import BypassPolicy, DitPolicy, OwnLam, make_batch

from lara_adapter import (
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    OptimizerCoverageError,
    TapNeverFired,
    attach_lara,
)


def snapshot(policy):
    return (
        {k: v.clone() for k, v in policy.state_dict().items()},
        {n: None if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()},
        torch.get_rng_state(),
        {n: m.training for n, m in policy.named_modules()},
    )


def same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert all(
        (a[1][k] is None) == (b[1][k] is None) and (a[1][k] is None or torch.equal(a[1][k], b[1][k])) for k in a[1]
    )
    assert torch.equal(a[2], b[2])
    assert a[3] == b[3]


def test_a_good_setup_is_reported_and_leaves_no_trace(policy, batch):
    lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()))
    optimizer = torch.optim.AdamW(policy.parameters())
    policy(batch)["loss"].backward()
    policy.eval()
    before = snapshot(policy)
    losses, metrics = lara.losses, lara.metrics()
    report = lara.check(batch, optimizer)
    assert report.ok, report.problems
    assert (report.blocks_reached, report.blocks_below, report.blocks_above_reached) == (3, 3, 0)
    assert report.projector_reached
    assert report.lam_reached
    assert report.optimizer_covers
    assert report.valid_fraction == 1
    assert report.parameters == sum(p.numel() for p in lara.parameters())
    text = str(report)
    assert "transformer_blocks.2 fired (layer 3)" in text
    assert "holds every LARA parameter" in text
    same(snapshot(policy), before)
    assert lara.losses is losses
    assert lara.metrics() == metrics


def test_no_attribute_of_the_adapter_and_no_point_of_the_history_stays(policy, lam, batch):
    def state():
        skipped = ("binding", "_modules", "_buffers", "history", "_monitor")
        plain = {name: value for name, value in lara.__dict__.items() if name not in skipped}
        monitor = copy.deepcopy(vars(lara._monitor))
        binding = {name: value for name, value in vars(lara.binding).items()}
        buffers = {name: value.clone() for name, value in lara.named_buffers()}
        return plain, copy.deepcopy(vars(lara.history)), monitor, binding, buffers

    lara = attach_lara(policy, lam)
    for trained in (False, True):
        if trained:
            policy(batch)["loss"].backward()
            lara.metrics()
        before = state()
        assert lara.check(batch).ok
        *after, buffers = state()
        assert after == list(before[:-1])
        assert all(torch.equal(value, before[-1][name]) for name, value in buffers.items())
    assert [step for step, _ in lara.history.points] == [1]


def test_an_optimizer_made_too_early_is_refused_with_the_fix(policy, lam, batch):
    optimizer = torch.optim.AdamW(policy.parameters())
    lara = attach_lara(policy, lam)
    with pytest.raises(OptimizerCoverageError, match=r"lacks 8 trainable.*lam\.inverse\.weight.*add_param_group"):
        lara.check(batch, optimizer)
    for group in lara.param_groups(lr=1e-3):
        optimizer.add_param_group(group)
    assert lara.check(batch, optimizer).ok


def test_no_valid_pair_is_a_problem(policy, lam, batch):
    lara = attach_lara(policy, lam)
    report = lara.check({**batch, "lara_frames_valid": torch.zeros(4, dtype=torch.bool)})
    assert not report.ok
    assert "no pair of this batch counts" in str(report)
    assert report.optimizer_covers is None


def test_frozen_lam_and_partly_frozen_policy(policy, lam, batch):
    policy.transformer_blocks[0].requires_grad_(False)
    report = attach_lara(policy, lam, train_lam=False).check(batch)
    assert report.ok
    assert report.lam_reached is None
    assert report.blocks_below == 2
    assert "LAM frozen" in str(report)


def test_idle_disabled_and_detached(policy, lam, batch):
    idle = attach_lara(policy, lam, align_weight=0, lam_weight=0)
    with pytest.raises(LaraArgumentError, match="idle"):
        idle.check(batch)
    idle.detach()
    lara = attach_lara(policy, lam)
    with lara.disabled(), pytest.raises(LaraArgumentError, match="disabled"):
        lara.check(batch)
    lara.detach()
    with pytest.raises(LaraArgumentError, match="detached"):
        lara.check(batch)


def test_errors_of_a_step_come_through_and_the_state_is_restored(batch):
    policy = BypassPolicy().train()
    lara = attach_lara(policy, OwnLam(), frames=lambda observation: observation["frames"])
    before = snapshot(policy)
    with pytest.raises(TapNeverFired):
        lara.check(({"frames": batch["lara_frames"]}, batch["action"]))
    same(snapshot(policy), before)


def test_keyword_batches():
    class Keywords(DitPolicy):
        def forward(self, inputs):
            return super().forward(inputs)

    policy = Keywords().train()
    lara = attach_lara(policy, OwnLam())
    assert lara.check({"inputs": make_batch()}).ok
    assert lara.check(make_batch()).ok


def test_a_contrastive_alignment_without_negatives_is_a_problem(policy, lam):
    lara = attach_lara(policy, lam, alignment="contrastive")
    assert lara.check(make_batch(size=2)).ok
    report = lara.check(make_batch(size=1))
    assert any("no negatives: valid pairs of all ranks 1, at least 2" in problem for problem in report.problems)
