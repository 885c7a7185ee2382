"""Proof by perturbation: on odd hosts `lara.check` says what is aligned, and which argument puts it right."""

import dataclasses
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import odd_hosts
from helpers.odd_hosts import BATCH, Host, make_batch
from helpers.toys import HORIZON, OwnLam

from lara_adapter import PolicySpec, TokenError, attach_lara
from lara_adapter.inspection import describe_policy

LENGTH = HORIZON + 1  # with the state token


def check(policy, batch=None, action=None, **arguments):
    spec = arguments.pop("spec", None)
    lara = attach_lara(
        policy.train(), OwnLam(), layer=-3, spec=None if spec is None else PolicySpec("x", **spec), **arguments
    )
    return lara.check(make_batch() if batch is None else batch, action=action)


def right(report, token, rows="proven"):
    assert report.problems == []
    assert report.ok
    assert report.proven
    assert report.token == f"{token}: proven"
    assert report.rows == rows
    assert f"{token}: proven; rows: {rows}" in str(report)


def wrong(report, *fixes):
    assert not report.ok
    assert not report.proven
    for fix in fixes:
        assert any(fix in problem for problem in report.problems), report.problems


@pytest.mark.parametrize(
    ("token", "where"),
    [
        ("last_valid", f"token {HORIZON}"),
        ("last", f"token {HORIZON}"),
        ("mean_valid", f"tokens 1 to {HORIZON}"),
        (0, "token 1"),
        (-2, f"token {HORIZON - 1}"),
        (lambda hidden, batch: hidden[:, -1], f"token {HORIZON}"),
    ],
)
def test_every_rule(token, where):
    right(check(Host(), token=token), f"{where} of {LENGTH}")


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_every_batch_size(size):
    right(check(Host(), make_batch(size)), f"token {HORIZON} of {LENGTH}")


def test_padding_is_counted():
    batch = make_batch()
    batch["action_is_pad"] = torch.zeros(BATCH, HORIZON, dtype=torch.bool)
    batch["action_is_pad"][1, 2:] = True
    batch["action_is_pad"][2] = True
    right(check(Host(), batch), f"tokens 2 to {HORIZON} of {LENGTH}")


def test_padding_under_another_key():
    batch = make_batch()
    batch["is_pad"] = torch.zeros(BATCH, HORIZON, dtype=torch.bool)
    right(check(Host(), batch), f"token {HORIZON} of {LENGTH}")  # nothing is padded here
    batch["is_pad"][1, 2:] = True
    wrong(check(Host(), batch), "padding='is_pad'")
    right(check(Host(), batch, spec={"padding": "is_pad"}), f"tokens 2 to {HORIZON} of {LENGTH}")
    batch["action_valid"] = ~batch.pop("is_pad")
    wrong(check(Host(), batch), "mask='action_valid'")
    right(check(Host(), batch, spec={"mask": "action_valid"}), f"tokens 2 to {HORIZON} of {LENGTH}")


def test_actions_at_the_front():
    right(check(odd_hosts.ActionsFirst(), spec={"action_tokens": "first"}), f"token {HORIZON - 1} of {LENGTH}")
    wrong(check(odd_hosts.ActionsFirst()), "action_tokens='first'")
    wrong(check(Host(), spec={"action_tokens": "first"}), "action_tokens='last'", f"token {HORIZON} of {LENGTH}")


@pytest.mark.parametrize(("order", "other"), [("tile", "interleave"), ("interleave", "tile")])
@pytest.mark.parametrize("draws", [2, 3])
def test_noise_draws(order, other, draws):
    report = check(odd_hosts.Repeats(order, draws), spec={"draws": order})
    right(report, f"token {HORIZON} of {LENGTH}", f"proven ({draws} draws, {order})")
    wrong(check(odd_hosts.Repeats(order, draws), spec={"draws": other}), f"draws={order!r}")


def test_samples_in_another_order():
    report = check(odd_hosts.Shuffles())
    wrong(report, "sample 0 is aligned with rows [0] of the tapped state, but its rows are [3]")
    assert report.rows == "WRONG"
    right(
        check(odd_hosts.Shuffles(), token=lambda hidden, batch: hidden[:, -1].flip(0)), f"token {HORIZON} of {LENGTH}"
    )


@pytest.mark.parametrize("size", [4, LENGTH])
def test_sequence_first(size):
    batch = make_batch(size)
    right(check(odd_hosts.SequenceFirst(), batch, spec={"layout": "sequence"}), f"token {HORIZON} of {LENGTH}")
    right(
        check(odd_hosts.SequenceFirst(), batch, token=lambda hidden, batch: hidden[-1]), f"token {HORIZON} of {LENGTH}"
    )
    if size == LENGTH:  # nothing in the shapes tells
        wrong(check(odd_hosts.SequenceFirst(), batch), "layout='sequence'")
        wrong(check(Host(), batch, spec={"layout": "sequence"}), "layout='batch'")
    else:
        with pytest.raises(TokenError, match="layout='sequence'"):
            check(odd_hosts.SequenceFirst(), batch)


def test_two_streams():
    with pytest.raises(TokenError, match=r"2 hidden states \(0: \[4, 5, 16\], 1: \[4, 7, 16\]\).*state=1"):
        check(odd_hosts.TwoStreams())
    right(check(odd_hosts.TwoStreams(), spec={"state": 1}), f"token {HORIZON} of {LENGTH}")
    with pytest.raises(TokenError, match="rows of 5 tokens"):  # too short for the actions
        check(odd_hosts.TwoStreams(), spec={"state": 0})
    wrong(check(odd_hosts.TwoStreams(context=20), spec={"state": 0}), "PolicySpec(..., state=")


def test_two_streams_of_one_length_cannot_be_told_apart():
    report = check(odd_hosts.TwoStreams(context=LENGTH), spec={"state": 0})
    assert not report.proven
    assert "2 streams of one shape" in report.token


def test_action_tokens_inside_a_sequence():
    batch = odd_hosts.InsideASequence.batch()
    for where in (7, "action_token_id", lambda batch: batch["input_ids"] == 7):
        report = check(odd_hosts.InsideASequence(), {**batch, "action_token_id": 7}, spec={"action_tokens": where})
        right(report, f"tokens {HORIZON - 1} to {HORIZON + 1} of {HORIZON + 6}")
    wrong(check(odd_hosts.InsideASequence(), batch), "action_tokens=")


def test_blocks_that_are_not_the_action_heads():
    wrong(check(odd_hosts.VisionBeside(), blocks="vision.blocks"), "do not see the action", "blocks='...'")
    right(check(odd_hosts.VisionBeside()), f"token {HORIZON} of {LENGTH}")


class OtherKey(Host):
    def forward(self, batch):
        return super().forward({**batch, "action": batch["chunk"]})


def test_another_action_key():
    batch = make_batch()
    batch["chunk"] = batch.pop("action")
    report = check(OtherKey(), batch)
    assert report.ok
    assert not report.proven
    assert "lara.check(batch, action='...')" in report.token
    right(check(OtherKey(), batch, action="chunk"), f"token {HORIZON} of {LENGTH}")
    right(check(OtherKey(), batch, spec={"action": "chunk"}), f"token {HORIZON} of {LENGTH}")
    batch["action"] = torch.zeros_like(batch["chunk"])  # there, but not what the policy learns
    wrong(check(OtherKey(), batch), "changes neither the loss nor the input")
    batch["action"] = torch.zeros(BATCH, 30, dtype=torch.long)
    assert "torch.int64" in check(OtherKey(), batch, token=lambda hidden, batch: hidden[:, -1]).token


class Keywords(Host):
    def forward(self, state, action, **kwargs):
        return super().forward({"state": state, "action": action})


class Samples(Host):
    def forward(self, samples):
        stacked = {key: torch.stack([torch.as_tensor(s[key]) for s in samples]) for key in ("state", "action")}
        assert not any("lara_frames" in sample for sample in samples)
        return super().forward(stacked)


class Scopes(Host):
    """CALVIN's loops: one batch a scope, and the head runs once for each."""

    def forward(self, batch):
        assert not any("lara_frames" in scope for scope in batch.values())
        return {"loss": sum(self.loss_of(scope["state"], scope["action"]) for scope in batch.values())}


class Fields(Host):
    def forward(self, batch):
        assert getattr(batch, "lara_frames", None) is None
        return {"loss": self.loss_of(batch.state, batch.action)}


@dataclasses.dataclass(frozen=True)
class Data:
    state: torch.Tensor
    action: torch.Tensor
    lara_frames: torch.Tensor | None = None


class Named(NamedTuple):
    state: torch.Tensor
    action: torch.Tensor
    lara_frames: torch.Tensor | None = None


def samples_of(batch, numpy=False):
    return [{key: value[i].numpy() if numpy else value[i] for key, value in batch.items()} for i in range(BATCH)]


@pytest.mark.parametrize(
    ("policy", "batch"),
    [
        (Keywords, make_batch()),
        (Samples, samples_of(make_batch())),
        (Samples, samples_of(make_batch(), numpy=True)),
        (Scopes, {"lang": make_batch(3), "vis": make_batch(2, seed=1)}),
        (Fields, Data(**make_batch())),
        (Fields, (Named(**make_batch()),)),
        (Fields, Named(**make_batch())),
    ],
    ids=["keywords", "samples", "numpy samples", "scopes", "dataclass", "tuple of a named tuple", "named tuple"],
)
def test_every_form_of_a_batch(policy, batch):
    right(check(policy(), batch), f"token {HORIZON} of {LENGTH}")


def test_a_tensordict():
    tensordict = pytest.importorskip("tensordict")
    right(check(Host(), tensordict.TensorDict(make_batch(), [BATCH])), f"token {HORIZON} of {LENGTH}")


class Dropped(Host):
    dropout = 0.3


def test_dropout_and_noise_from_elsewhere():
    right(check(Dropped()), f"token {HORIZON} of {LENGTH}")
    right(check(odd_hosts.FromNumpy()), f"token {HORIZON} of {LENGTH}")
    report = check(odd_hosts.OwnGenerator())
    assert report.ok
    assert not report.proven
    assert "a generator of its own" in report.token


class OftenPureNoise(Host):
    """At some noise levels nothing is left of a sample's action."""

    def noise(self, action):
        return torch.randn_like(action), (torch.rand(len(action)) > 0.5).float()


def test_levels_at_which_nothing_is_left_of_the_action():
    right(check(OftenPureNoise()), f"token {HORIZON} of {LENGTH}")


class Mixes(Host):
    def embed(self, state, noisy, time):
        return super().embed(state, noisy, time) + noisy.mean()


def test_samples_that_influence_each_other():
    report = check(Mixes())
    assert report.ok
    assert not report.proven
    assert "influence each other" in report.token


def test_it_leaves_no_trace():
    policy = Dropped().train()
    lara = attach_lara(policy, OwnLam(), layer=-3)
    batch = make_batch()
    before = {key: value.clone() for key, value in batch.items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    policy.eval()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.modules()]
    assert lara.check(batch).proven
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert not policy.training
    assert all(p.grad is None for p in policy.parameters())
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in policy.modules()]
    assert all(torch.equal(before[key], batch[key]) for key in before)
    assert lara.step == 0
    assert lara.metrics() == {}


def test_a_policy_that_changes_its_batch_in_place():
    class InPlace(Host):
        def forward(self, batch):
            batch["action"] = batch["action"] * 2
            batch["action"][:, 0] += 1
            return super().forward(batch)

    right(check(InPlace()), f"token {HORIZON} of {LENGTH}")


def test_inspect_proves_the_same_without_a_lam_and_frames():
    batch = make_batch()
    del batch["lara_frames"]
    policy = Host()
    report = describe_policy(policy, batch=batch)
    assert report.ok
    assert report.proof == f"token {HORIZON} of {LENGTH}: proven; rows: proven"
    assert not hasattr(policy, "lara")
    report = describe_policy(odd_hosts.VisionBeside(), blocks="vision.blocks", batch=batch)
    assert not report.ok
    assert "PROBLEM     the blocks at 'vision.blocks' do not see the action" in str(report)
    with torch.device("meta"):
        policy = Host()
    assert "meta device" in describe_policy(policy, batch=batch).error
