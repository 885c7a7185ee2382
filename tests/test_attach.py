"""The contract of attach_lara: exact losses, gradients where they belong, no trace anywhere else."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from helpers.toys import BypassPolicy, DitPolicy, NonePolicy, OwnLam, TuplePolicy, gradients, make_batch
from torch import nn

import lara_adapter
from lara_adapter import (
    AttachOrderError,
    FrameError,
    FramePair,
    HostOutputError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    TapDetached,
    TokenError,
    attach_lara,
)


def fingerprint(policy: nn.Module) -> dict:
    return {
        "class": type(policy),
        "dict": sorted(policy.__dict__),
        "state": {k: v.clone() for k, v in policy.state_dict().items()},
        "modules": [(n, id(m)) for n, m in policy.named_modules()],
        "flags": {n: p.requires_grad for n, p in policy.named_parameters()},
        "modes": {n: m.training for n, m in policy.named_modules()},
        "hooks": {
            n: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._forward_hooks_with_kwargs),
                list(m._forward_pre_hooks_with_kwargs))
            for n, m in policy.named_modules()
        },
        "signature": inspect.signature(policy.forward),
        "forward": policy.forward.__func__,
        "repr": repr(policy),
    }  # fmt: skip


def assert_same(a: dict, b: dict) -> None:
    states = a.pop("state"), b.pop("state")
    assert a == b
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


class ModelOutputPolicy(DitPolicy):
    def forward(self, batch):
        from transformers.utils import ModelOutput

        return ModelOutput(loss=super().forward(batch)["loss"], logits=None)


class UserDictPolicy(DitPolicy):
    """BatchFeature's shape (GR00T, transformers)."""

    def forward(self, batch):
        return UserDict(super().forward(batch))


@dataclass
class Output:
    loss: torch.Tensor


class ObjectPolicy(DitPolicy):
    def forward(self, batch):
        return Output(super().forward(batch)["loss"])


class PlainTuplePolicy(DitPolicy):
    def forward(self, batch):
        return super().forward(batch)["loss"], "logits", 3


class ElementPolicy(DitPolicy):
    """openpi's shape: a tensor of per-element losses."""

    def forward(self, batch):
        return self.loss_of(batch)[0]


def loss_of(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.mean()
    if isinstance(output, tuple):
        return output[0].mean()
    return output["loss"] if hasattr(output, "keys") else output.loss


HOSTS = [
    DitPolicy,
    UserDictPolicy,
    ModelOutputPolicy,
    ObjectPolicy,
    TuplePolicy,
    NonePolicy,
    PlainTuplePolicy,
    ElementPolicy,
]


@pytest.mark.parametrize("host", HOSTS)
def test_loss_is_exactly_action_plus_weighted_terms(host):
    if host is ModelOutputPolicy:
        pytest.importorskip("transformers")
    policy = host().train()
    batch = make_batch()
    torch.manual_seed(7)
    plain = policy(batch)
    lara = attach_lara(policy, OwnLam(), align_weight=0.3, lam_weight=0.7)
    torch.manual_seed(7)
    output = policy(batch)
    assert type(output) is type(plain)
    align, lam_loss, total = lara.losses
    assert torch.allclose(total, 0.3 * align + 0.7 * lam_loss)
    assert torch.allclose(loss_of(output), loss_of(plain) + total, atol=1e-6)
    loss_of(output).backward()
    assert all(p.grad is not None for p in lara.parameters())


def test_align_and_lam_loss_against_a_reference_written_by_hand(policy, lam, batch):
    lara = attach_lara(policy, lam, projector="linear")
    policy(batch)
    hidden = policy.hidden_states[-3][:, -1]
    present, future = batch["lara_frames"][:, 0], batch["lara_frames"][:, 1]
    z = lam.encode(present, future).continuous.flatten(1)
    p = hidden @ lara.projector.weight.T + lara.projector.bias
    cos = (p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))
    assert torch.allclose(lara.losses.align, (1 - cos).mean(), atol=1e-6)
    assert torch.allclose(lara.losses.lam, lam(present, future).loss, atol=1e-6)
    assert lara.metrics()["cosine"] == pytest.approx(cos.mean().item(), abs=1e-6)


def test_metrics_reach_a_loss_dict_host_as_plain_floats(batch):
    for host, own in ((TuplePolicy, {"l2"}), (NonePolicy, set())):
        policy = host().train()
        lara = attach_lara(policy, OwnLam())
        _, log = policy(batch)
        assert own <= log.keys()
        assert all(type(v) is float for v in log.values())
        assert log["lara/align_loss"] == lara.metrics()["align_loss"]


def test_per_sample_losses_get_per_sample_terms(batch):
    policy = TuplePolicy().train()
    batch["lara_frames_valid"] = torch.tensor([True, False, True, True])
    torch.manual_seed(3)
    plain, _ = policy(batch, reduction="none")
    lara = attach_lara(policy, OwnLam(), align_weight=1.0, lam_weight=0.5)
    torch.manual_seed(3)
    loss, _ = policy(batch, reduction="none")
    extra = loss - plain
    assert torch.allclose(extra.mean(), lara.losses.total, atol=1e-6)
    # the invalid pair has only the LAM's share
    assert torch.allclose(extra[1], 0.5 * lara.losses.lam, atol=1e-6)


def test_gradients_reach_below_the_tap_and_nothing_above(policy, lam, batch):
    lara = attach_lara(policy, lam, layer=-3)
    policy(batch)
    lara.losses.total.backward()
    reached = [any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in policy.transformer_blocks]
    assert reached == [True, True, True, False, False]
    assert policy.action_out.weight.grad is None
    assert policy.action_in.weight.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in lara.projector.parameters())
    assert all(p.grad is not None and p.grad.any() for p in lara.lam.parameters())


@pytest.mark.parametrize("host", [DitPolicy, TuplePolicy, ElementPolicy])
def test_weights_zero_train_bit_identically_to_never_attached(host, batch):
    plain = host().train()
    policy = copy.deepcopy(plain)
    runs, lam = [], OwnLam(dropout=0.5)
    for model, attach in ((plain, False), (policy, True)):
        torch.manual_seed(5)
        if attach:
            attach_lara(model, lam, align_weight=0, lam_weight=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for seed in range(5):
            loss = loss_of(model(make_batch(seed=seed)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, {k: v for k, v in model.state_dict().items() if not k.startswith("lara.")}))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][k], runs[1][1][k]) for k in runs[0][1])


def test_weight_zero_returns_the_hosts_own_object(batch):
    class Caching(DitPolicy):
        def forward(self, batch):
            self.returned = super().forward(batch)
            return self.returned

    policy = Caching().train()
    attach_lara(policy, OwnLam(), align_weight=0, lam_weight=0)
    assert policy(batch) is policy.returned


def test_align_weight_zero_does_not_touch_the_policy(batch):
    """Only the LAM trains; the policy's gradients are those of the baseline, bit for bit."""
    plain = DitPolicy().train()
    policy = copy.deepcopy(plain)
    attach_lara(policy, OwnLam(), align_weight=0, lam_weight=1.0)
    for model in (plain, policy):
        torch.manual_seed(2)
        model(batch)["loss"].backward()
    assert all(torch.equal(a.grad, dict(policy.named_parameters())[n].grad) for n, a in plain.named_parameters())
    assert all(p.grad is not None for p in policy.lara.parameters())


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_noise_and_the_action_loss_are_those_of_the_baseline(batch, alignment, dropout):
    """Neither attaching nor the LAM's draws shift the host's random numbers."""
    plain = DitPolicy().train()
    policy = copy.deepcopy(plain)
    torch.manual_seed(11)
    expected = [plain(batch)["loss"].item() for _ in range(3)]
    lam = OwnLam(dropout)
    torch.manual_seed(11)
    lara = attach_lara(policy, lam, alignment=alignment, add_to_loss=False)
    assert [policy(batch)["loss"].item() for _ in range(3)] == expected
    assert lara.losses.total.requires_grad


def test_a_lam_with_dropout_draws_anew_at_each_step(policy, batch):
    lara = attach_lara(policy, OwnLam(dropout=0.5), lam_weight=1.0)
    values = set()
    for _ in range(3):
        policy(batch)
        values.add(lara.metrics()["lam_loss"])
    assert len(values) == 3


def test_detach_leaves_no_trace(policy, lam, batch):
    before, lam_before = fingerprint(policy), fingerprint(lam)
    lara = attach_lara(policy, lam, train_lam=False)
    policy(batch)["loss"].backward()
    policy.zero_grad(set_to_none=True)
    policy.hidden_states = []
    assert "lara.projector.0.weight" in policy.state_dict()
    lara.detach()
    assert_same(fingerprint(policy), before)
    assert_same(fingerprint(lam), lam_before)
    with pytest.raises(AttachOrderError, match="not attached"):
        lara.detach()
    attach_lara(policy, lam)  # and again


def test_detach_of_a_norm_tap_and_of_a_forward_of_the_instances_own(batch):
    policy = DitPolicy().train()
    policy.forward = type(policy).forward.__get__(policy)
    own = policy.__dict__["forward"]
    lara = attach_lara(policy, OwnLam(), layer=0)
    policy(batch)["loss"].backward()
    assert lara.losses.align.requires_grad
    lara.detach()
    assert policy.__dict__["forward"] is own
    assert not policy.transformer_blocks[0]._forward_pre_hooks
    assert not policy.transformer_blocks[0]._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("training", [False, True])  # some hosts sample in training mode
@pytest.mark.parametrize("trained", [False, True])
def test_sampling_with_lara_attached_is_bit_identical(policy, lam, batch, training, trained):
    torch.manual_seed(4)
    expected = policy.train(training).get_action(batch["state"])
    lara = attach_lara(policy, lam)
    if trained:
        policy.train()
        policy(batch)
    torch.manual_seed(4)
    assert torch.equal(policy.train(training).get_action(batch["state"]), expected)
    assert lara.binding._captured == ()


def test_eval_and_no_grad_cost_nothing_and_need_no_frames(policy, batch, monkeypatch):
    lara = attach_lara(policy, OwnLam())
    monkeypatch.setattr(lara, "forward", None)  # would fail if called
    del batch["lara_frames"]
    policy.eval()
    torch.manual_seed(1)
    in_eval = policy(batch)["loss"]
    policy.train()
    with torch.no_grad():
        policy(batch)
    with lara.disabled():
        torch.manual_seed(1)
        assert torch.equal(policy(batch)["loss"], in_eval)
    with pytest.raises(FrameError, match="the batch has no 'lara_frames'; it has"):
        policy(batch)


def test_the_policy_never_sees_the_future_frame():
    class Greedy(DitPolicy):
        def forward(self, batch):
            assert not any(key.startswith("lara") for key in batch), "the future frame leaked"
            self.seen = sorted(batch)
            return super().forward(batch)

    policy = Greedy().train()
    attach_lara(policy, OwnLam())
    batch = make_batch()
    batch["lara_frames_valid"] = torch.ones(4, dtype=torch.bool)
    for mode in (True, False):
        policy.train(mode)
        policy(batch)
    assert policy.seen == ["action", "action_mask", "state"]
    assert "lara_frames" in batch  # the user's batch is left as it is
    policy(UserDict(batch))  # and any other mapping


def test_the_future_frame_changes_the_lam_and_not_the_policys_output(policy, lam, batch):
    attach_lara(policy, lam, add_to_loss=False)
    other = {**batch, "lara_frames": batch["lara_frames"].clone()}
    other["lara_frames"][:, 1] = 255 - other["lara_frames"][:, 1]
    results = []
    for b in (batch, other):
        torch.manual_seed(1)
        results.append((policy(b)["action_loss"], policy.lara.losses.align))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_invalid_pairs_get_zero_gradient_and_do_not_count(alignment):
    """The gradients of a batch with invalid pairs are those of the batch without them."""
    batch, valid = make_batch(), torch.tensor([True, False, True, False])
    torch.manual_seed(0)
    policy, lam = DitPolicy().train(), OwnLam()
    reference = copy.deepcopy(policy)
    attach_lara(policy, lam, alignment=alignment, add_to_loss=False)
    attach_lara(reference, copy.deepcopy(lam), alignment=alignment, add_to_loss=False)
    reference.lara.projector.load_state_dict(policy.lara.projector.state_dict())
    fixed = torch.randn(4, 6, 3)
    for model, rows in ((policy, torch.arange(4)), (reference, torch.tensor([0, 2]))):
        model.loss_of = lambda b, model=model, rows=rows: (
            model.denoise(b["state"], fixed[rows], torch.full((len(rows),), 0.5)) * 0.0,
            torch.ones(len(rows), 6, 3),
        )
    policy({**batch, "lara_frames_valid": valid})
    reference({k: v[[0, 2]] for k, v in batch.items()})
    # a LAM without flags gets copies of a valid pair, which changes its mean; the alignment is exact
    policy.lara.losses.align.backward()
    reference.lara.losses.align.backward()
    for name, gradient in gradients(policy).items():
        other = gradients(reference)[name]
        if other is None:
            assert gradient is None, name
        else:
            assert torch.allclose(gradient, other, atol=1e-6), name


def test_a_batch_without_any_valid_pair_keeps_every_parameter_in_the_graph_with_zero_gradient(batch):
    for lam in (OwnLam(), LatentActionModel(LatentActionConfig.tiny())):
        policy = DitPolicy().train()
        lara = attach_lara(policy, lam)
        policy({**batch, "lara_frames_valid": torch.zeros(4, dtype=torch.bool)})
        assert lara.losses.total.item() == 0
        lara.losses.total.backward()
        assert all(p.grad is not None and not p.grad.any() for p in lara.parameters() if p.requires_grad)


def test_several_views_average_the_alignment_over_views(lam):
    batch = make_batch(views=2)
    policy = DitPolicy().train()
    lara = attach_lara(policy, lam, lam_weight=0.5)
    torch.manual_seed(1)
    policy(batch)
    both = lara.losses.align
    single = []
    for view in range(2):
        torch.manual_seed(1)
        policy({**batch, "lara_frames": batch["lara_frames"][:, view]})
        single.append(lara.losses.align)
    assert torch.allclose(both, (single[0] + single[1]) / 2, atol=1e-6)


def test_frozen_lam_is_eq_5(policy, batch):
    lam = LatentActionModel(LatentActionConfig.tiny())
    before = {k: v.clone() for k, v in lam.state_dict().items()}
    lara = attach_lara(policy, lam, train_lam=False, lam_weight=1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for seed in range(3):
        policy.train()
        policy(make_batch(seed=seed))["loss"].backward()
        optimizer.step()
    assert not lam.training
    assert lara.losses.lam.item() == 0
    assert "reconstruction_loss" not in lara.metrics()
    assert all(torch.equal(before[k], v) for k, v in lam.state_dict().items())
    assert all(p.grad is None for p in lam.parameters())
    lara.detach()
    assert all(p.requires_grad for p in lam.parameters())


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_lam_grad_scale(factor, batch):
    collected = []
    for scale in (1.0, factor):
        torch.manual_seed(0)
        policy = DitPolicy().train()
        lara = attach_lara(policy, OwnLam(), lam_grad_scale=scale)
        torch.manual_seed(1)
        policy(batch)
        lara.losses.align.backward()
        collected.append(gradients(policy))
    full, scaled = collected
    for name, gradient in full.items():
        if name.startswith("lara.lam.inverse"):
            assert torch.allclose(scaled[name] if factor else torch.zeros(()), factor * gradient, atol=1e-7)
        elif gradient is not None:
            assert torch.equal(gradient, scaled[name]), name


def test_add_to_loss_false_leaves_the_loss_to_the_user(policy, lam, batch):
    torch.manual_seed(1)
    plain = policy(batch)["loss"]
    lara = attach_lara(policy, lam, add_to_loss=False)
    torch.manual_seed(1)
    output = policy(batch)
    assert torch.equal(output["loss"], plain)
    (output["loss"] + lara.losses.total).backward()
    assert lara.projector[0].weight.grad.any()


def test_frames_from_a_callable_see_the_first_argument(batch):
    policy = BypassPolicy().train()
    policy.sees = None

    def frames(observation):
        policy.sees = observation
        return FramePair(observation["now"], observation["later"], torch.tensor([True, True, False, True]))

    pair = FramePair.from_tensor(batch["lara_frames"])
    observation = {"now": pair.present, "later": pair.future}
    spec = lara_adapter.PolicySpec("b", ("helpers:BypassPolicy",), "layers", tap="norm", final_norm="norm")
    from lara_adapter import policies

    policies._TABLE.insert(0, spec)
    try:
        lara = attach_lara(policy, OwnLam(), frames=frames)
        loss = policy(observation, batch["action"])
    finally:
        policies._TABLE.remove(spec)
    assert policy.sees is observation
    assert loss.shape == batch["action"].shape
    assert lara.metrics()["valid_fraction"] == 0.75
    lara.detach()
    lara = attach_lara(policy, OwnLam(), layer=0, blocks="layers", frames=lambda observation: 3)
    with pytest.raises(FrameError, match="returned int, but a FramePair"):
        policy(observation, batch["action"])


class CotrainedPolicy(DitPolicy):
    """Robot batches, and vision-language ones that never reach the DiT."""

    def forward(self, batch):
        if "answer" in batch:
            return {"loss": (self.state_in(batch["state"]).mean(1) - batch["answer"]).square().mean()}
        return super().forward(batch)


def vision_language():
    return {"state": torch.randn(3, 2), "answer": torch.randn(3)}


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
@pytest.mark.parametrize("tiny", [False, True], ids=["a user's LAM", "ours"])
def test_a_batch_without_frames_counts_for_nothing_where_that_is_said(alignment, tiny, batch, caplog):
    policy, other = CotrainedPolicy().train(), vision_language()
    lam = LatentActionModel(LatentActionConfig.tiny(vq_revive_every=1)) if tiny else OwnLam()
    lara = attach_lara(policy, lam, alignment=alignment, frames_optional=True)
    policy(batch)["loss"].backward()
    assert lara.check(batch).ok
    policy.zero_grad()
    before = {n: v.clone() for n, v in policy.state_dict().items() if n != "lara._step"}
    expected = CotrainedPolicy.forward(policy, other)["loss"]
    loss = policy(other)["loss"]
    loss.backward()
    assert torch.equal(loss, expected)
    assert lara.losses.total == 0
    assert all(p.grad is not None and not p.grad.any() for p in lara.parameters())
    assert policy.state_in.weight.grad.any()
    assert all(torch.equal(v, before[n]) for n, v in policy.state_dict().items() if n in before)
    assert lara.metrics() == {}  # nothing was measured
    assert lara.step == 2  # schedules go by training forwards, on all ranks alike
    assert "no negatives" not in caplog.text
    with pytest.raises(FrameError, match=r"lara\.check: this batch has no frames"):
        lara.check(other)
    policy(batch)
    assert lara.metrics()["align_loss"] > 0


def test_a_missing_frame_is_an_error_that_names_the_way(policy, lam):
    attach_lara(policy, lam)
    with pytest.raises(FrameError, match=r"If some batches.*attach_lara\(frames_optional=True\)"):
        policy({"state": torch.zeros(1, 2), "action": torch.zeros(1, 6, 3)})


def test_frames_from_a_callable_may_be_none(lam, batch):
    policy = CotrainedPolicy().train()
    lara = attach_lara(policy, lam, frames=lambda b: b.get("lara_frames"), frames_optional=True)
    policy(batch)
    policy(vision_language())
    assert (lara.step, lara.metrics()) == (2, {})


def test_a_first_batch_without_frames(lam):
    policy = CotrainedPolicy().train()
    attach_lara(policy, lam, frames_optional=True)
    with pytest.raises(FrameError, match="does not state their size; begin with a batch that has some"):
        policy(vision_language())
    policy.lara.detach()
    lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), frames_optional=True)
    policy(vision_language())["loss"].backward()
    assert lara.losses.total == 0


def test_frames_that_never_come_are_said(caplog):
    policy = CotrainedPolicy().train()
    attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), frames="typo", frames_optional=True)
    for _ in range(101):
        policy(vision_language())
    assert caplog.text.count("LARA is idle: none of the first 100 batches has frames (frames='typo'") == 1


def test_keyword_calls_as_transformers_makes_them(lam):
    class Keywords(DitPolicy):
        def forward(self, state, action, action_mask=None):
            return super().forward({"state": state, "action": action, "action_mask": action_mask})

    policy = Keywords().train()
    lara = attach_lara(policy, lam)
    batch = make_batch(padded=True)
    output = policy(**batch)  # the host's forward has no lara_frames: they are taken out of the call
    assert output["loss"].requires_grad
    assert lara.metrics()["valid_fraction"] == 1.0
    assert list(inspect.signature(policy.forward).parameters) == ["state", "action", "action_mask"]
    nested = DitPolicy().train()
    attach_lara(nested, OwnLam())
    assert nested(batch=batch)["loss"].requires_grad


def test_repeated_noise_draws_are_matched_in_the_hosts_order(monkeypatch):
    """vla_jepa repeats the batch by tiling: row j * B + i is sample i."""
    from lara_adapter import PolicySpec, policies

    class Repeating(DitPolicy):
        def forward(self, batch):
            repeat = (lambda t: t.repeat(3, *[1] * (t.ndim - 1))) if self.order == "tile" else (
                lambda t: t.repeat_interleave(3, 0))  # fmt: skip
            return super().forward({k: repeat(v) for k, v in batch.items()})

    results = {}
    for order in ("tile", "interleave"):
        monkeypatch.setattr(
            policies,
            "_TABLE",
            [
                PolicySpec(
                    "r", (f"{Repeating.__module__.partition('.')[0]}:Repeating",), "transformer_blocks", draws=order
                )
            ],
        )
        torch.manual_seed(0)
        policy = Repeating().train()
        policy.order = order
        lara = attach_lara(policy, OwnLam(), projector="linear")
        batch = make_batch(padded=True)
        policy(batch)
        hidden = policy.hidden_states[-3]
        z = lara.lam.encode(batch["lara_frames"][:, 0], batch["lara_frames"][:, 1]).continuous.flatten(1)
        losses = []
        for row in range(12):
            sample = row % 4 if order == "tile" else row // 3
            p = lara.projector(hidden[row, 1 + 6 - sample - 1])
            losses.append(1 - torch.cosine_similarity(p, z[sample], dim=0))
        results[order] = lara.losses.align.item()
        assert torch.allclose(torch.stack(losses).mean(), lara.losses.align, atol=1e-6)
    monkeypatch.setattr(policies, "_TABLE", [])
    policy = Repeating().train()
    policy.order = "tile"
    attach_lara(policy, OwnLam())
    with pytest.raises(TokenError, match=r"has 12 rows, but the batch has 4 pairs.*draws="):
        policy(make_batch())


# ------------------------------------------------------------------ refusals


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "name", ["DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"]
)
def test_wrapped_policies_are_refused_with_the_right_order(name, policy, lam):
    wrapped = type(name, (Wrapper,), {})(policy)
    with pytest.raises(AttachOrderError, match=f"the policy itself is wrapped in {name}"):
        attach_lara(wrapped, lam)


def test_real_wrappers_are_refused(policy, lam):
    with pytest.raises(AttachOrderError, match=r"OptimizedModule; attach_lara first, then torch\.compile"):
        attach_lara(torch.compile(policy, backend="eager"), lam)
    with pytest.raises(AttachOrderError, match="wrapped in DataParallel; use torchrun"):
        attach_lara(nn.DataParallel(policy), lam)
    policy.compile(backend="eager")
    with pytest.raises(AttachOrderError, match=r"policy\.compile\(\) was called already"):
        attach_lara(policy, lam)


def test_what_has_no_values_yet_is_refused(policy, lam):
    """`to_empty` after attaching would wipe a pre-trained LAM."""
    with torch.device("meta"):
        empty, no_lam, head = DitPolicy(), OwnLam(), nn.Linear(16, 8)
    with pytest.raises(AttachOrderError, match=r"policy has no .* 'position' is .*Materialise first.*offload"):
        attach_lara(empty, lam)
    part = DitPolicy()
    part.action_out.to("meta")  # as accelerate's offload leaves it
    with pytest.raises(AttachOrderError, match=r"'action_out.weight' is on the meta device"):
        attach_lara(part, lam)
    with pytest.raises(AttachOrderError, match=r"the LAM .* 'inverse.weight' is on the meta device"):
        attach_lara(policy, no_lam)
    with pytest.raises(AttachOrderError, match=r"projector= .* 'weight' is on the meta device"):
        attach_lara(policy, lam, projector=head)
    assert not hasattr(policy, "lara")
    attach_lara(policy, lam)


def test_attached_twice(policy, lam):
    attach_lara(policy, lam)
    with pytest.raises(AttachOrderError, match=r"has LARA already, at 'lara'; policy\.lara\.detach\(\) first"):
        attach_lara(policy, OwnLam())


def test_a_data_parallel_replica_is_refused(policy, lam, batch):
    attach_lara(policy, lam)
    policy._is_replica = True
    with pytest.raises(AttachOrderError, match="torchrun or accelerate launch"):
        policy(batch)


def test_frozen_after_attach_is_refused(policy, lam, batch):
    attach_lara(policy, lam)
    policy.requires_grad_(False)
    with pytest.raises(AttachOrderError, match=r"were frozen after attach_lara.* Order: policy = get_peft_model"):
        policy(batch)


def test_a_replaced_block_is_noticed(policy, lam, batch):
    attach_lara(policy, lam)
    policy.transformer_blocks[2] = copy.deepcopy(policy.transformer_blocks[1])
    with pytest.raises(AttachOrderError, match=r"'transformer_blocks\.2' was replaced after attach_lara"):
        policy(batch)


def test_nothing_trainable_below_the_tap(policy, lam, batch):
    policy.requires_grad_(False)
    policy.action_out.requires_grad_(True)
    attach_lara(policy, lam)
    with pytest.raises(TapDetached, match="no trainable parameter lies below"):
        policy(batch)


def test_a_policy_of_which_nothing_trains_is_said_once(policy, lam, batch, caplog):
    policy.requires_grad_(False)
    lara = attach_lara(policy, lam)
    for _ in range(2):
        policy(batch)["loss"].backward()
    assert caplog.text.count("nothing of DitPolicy is trainable") == 1
    assert any(p.grad is not None for p in lara.projector.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projector": "cnn"}, "'mlp', 'linear' or a module"),
        ({"frames": 3}, "a batch key or a callable"),
        ({"token": "first"}, "'last_valid'"),
        ({"alignment": "l2"}, "cosine"),
        ({"lam_grad_scale": lambda step: 1.0}, "lam_grad_scale is callable"),
    ],
)
def test_wrong_arguments_leave_the_policy_alone(policy, lam, arguments, message):
    before = fingerprint(policy)
    with pytest.raises(LaraArgumentError, match=message):
        attach_lara(policy, lam, **arguments)
    assert_same(fingerprint(policy), before)


def test_wrong_policies_and_lams(policy, lam):
    with pytest.raises(LaraArgumentError, match="policy is a dict"):
        attach_lara({}, lam)
    with pytest.raises(LaraArgumentError, match="lam is a Linear, but a LatentActionModel"):
        attach_lara(policy, nn.Linear(2, 2))
    widthless = OwnLam()
    widthless.latent_width = None
    with pytest.raises(LaraArgumentError, match=r"lam\.latent_width is None"):
        attach_lara(policy, widthless)
    policy.aux = lam
    with pytest.raises(LaraArgumentError, match="shares parameters with the policy"):
        attach_lara(policy, lam)


def test_a_projector_of_a_wrong_width_names_both(policy, lam, batch):
    attach_lara(policy, lam, projector=nn.Linear(16, 9))
    with pytest.raises(LaraArgumentError, match="the projector gives width 9, but the latent action has 8"):
        policy(batch)


def test_outputs_without_a_loss(lam, batch):
    class NoLoss(DitPolicy):
        def forward(self, batch):
            super().forward(batch)
            return {"prediction": torch.zeros(3)}

    class Text(DitPolicy):
        def forward(self, batch):
            super().forward(batch)
            return "0.5"

    policy = NoLoss().train()
    attach_lara(policy, lam)
    with pytest.raises(HostOutputError, match=r"returned dict with \['prediction'\] in training.*add_to_loss=False"):
        policy(batch)
    policy = Text().train()
    attach_lara(policy, OwnLam())
    with pytest.raises(HostOutputError, match="returned str"):
        policy(batch)


@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: (p, {}), lambda p: {"loss": p}], ids=["tensor", "tuple", "dict"]
)
def test_predicted_actions_are_not_taken_for_losses(lam, batch, wrap):
    """LARA's loss would be added to every one of them, and a loss computed outside would train it away."""

    class Predicts(DitPolicy):
        def forward(self, batch):
            loss = super().forward(batch)["loss"]
            return wrap(batch["action"] * loss)

    policy = Predicts().train()
    lara = attach_lara(policy, lam)
    with pytest.raises(HostOutputError, match=r"some below zero: predicted actions.*add_to_loss=False"):
        policy(batch)
    with pytest.raises(HostOutputError, match="predicted actions"):
        attach_lara(Predicts().train(), OwnLam()).check(batch)
    lara.detach()
    lara = attach_lara(policy, lam, add_to_loss=False)
    policy(batch)
    assert lara.losses.total.requires_grad


def test_unreduced_losses_are_losses(lam, batch):
    class Unreduced(DitPolicy):
        def forward(self, batch):
            return (batch["action"] * super().forward(batch)["loss"]).square()

    policy = Unreduced().train()
    lara = attach_lara(policy, lam)
    torch.manual_seed(1)
    folded, total = policy(batch), lara.losses.total.detach()
    lara.detach()
    torch.manual_seed(1)
    difference = folded - policy(batch)
    assert torch.allclose(difference, total.expand_as(difference), atol=1e-5)


def test_lam_by_folder(policy, tmp_path):
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(tmp_path / "lam")
    lara = attach_lara(policy, str(tmp_path / "lam"))
    assert lara.lam.config == LatentActionConfig.tiny()
