"""Several runs of the blocks in one call, several states, shared blocks, torch.func: the right state, or an error."""

import dataclasses

import pytest
import torch
from helpers.odd_hosts import BATCH, Host, make_batch
from helpers.toys import HORIZON, OwnLam
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lara_adapter import PolicySpec, TapDetached, TokenError, attach_lara
from lara_adapter.capture import input_state, join_runs, pick_state

LENGTH = HORIZON + 1


def states_of(policy, block, batch, **arguments):
    """The state that LARA read, and what the block returned in each run."""
    runs, read = [], []
    policy.flow_blocks[block].register_forward_hook(lambda module, args, output: runs.append(output.detach().clone()))
    lara = attach_lara(policy.train(), OwnLam(), **{"layer": block + 1, **arguments})
    original = lara.select

    def select(hidden, *rest):
        read.append(hidden.detach().clone())
        return original(hidden, *rest)

    lara.select = select
    policy(batch)["loss"].backward()
    assert lara.projector[0].weight.grad is not None
    del lara.select
    assert lara.check(batch).proven
    return read[0], runs[: len(runs)]


class SelfConditioned(Host):
    """A pass without gradient comes first."""

    def trunk(self, x):
        with torch.no_grad():
            guess = super().trunk(x)
        return super().trunk(x + 0.1 * guess)


class Teacher(Host):
    """A pass without gradient comes afterwards."""

    def trunk(self, x):
        y = super().trunk(x)
        with torch.no_grad():
            super().trunk(x * 2)
        return y


@pytest.mark.parametrize(("policy", "run"), [(SelfConditioned, 1), (Teacher, 0)])
def test_the_run_with_a_graph_is_read(policy, run):
    read, runs = states_of(policy(), 1, make_batch())
    assert torch.equal(read, runs[run])


class Split(Host):
    """ManiFlow's way: the first three quarters of the batch, then the rest."""

    def trunk(self, x):
        cut = 3 * len(x) // 4
        return torch.cat([super(Split, self).trunk(part) for part in (x[:cut], x[cut:])])


def test_parts_of_the_batch_are_joined():
    read, runs = states_of(Split(), 1, make_batch())
    assert [len(run) for run in runs[:2]] == [3, 1]
    assert torch.equal(read, torch.cat(runs[:2]))


class Draws(Host):
    """Two noise draws, one after the other."""

    def forward(self, batch):
        losses = [self.loss_of(batch["state"], batch["action"]) for _ in range(2)]
        return {"loss": sum(losses) / 2}


def test_two_runs_of_the_whole_batch_must_be_told_apart():
    with pytest.raises(
        TokenError, match=r"the blocks ran 2 times in one call with rows \[4, 4\].*4 pairs.*run=0.*draws='tile'"
    ):
        states_of(Draws(), 1, make_batch())
    for run in (0, -1):
        read, runs = states_of(Draws(), 1, make_batch(), spec=PolicySpec("x", run=run))
        assert torch.equal(read, runs[run if run == 0 else 1])
    read, runs = states_of(Draws(), 1, make_batch(), spec=PolicySpec("x", draws="tile"))
    assert torch.equal(read, torch.cat(runs[:2]))
    with pytest.raises(TokenError, match=r"there is no run=5"):
        states_of(Draws(), 1, make_batch(), spec=PolicySpec("x", run=5))


class Tied(Host):
    """One block, four times in the list."""

    def __init__(self):
        super().__init__()
        self.flow_blocks = nn.ModuleList([self.flow_blocks[0]] * 4)


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_tied_depth_reads_the_run_of_the_layer_named(block):
    read, runs = states_of(Tied(), block, make_batch())
    assert torch.equal(read, runs[block])


class Looped(Host):
    """The whole list, three times."""

    def trunk(self, x):
        for _ in range(3):
            x = super().trunk(x)
        return x


def test_looped_depth_is_asked_for():
    with pytest.raises(TokenError, match=r"ran 3 times in one call with rows \[4, 4, 4\]"):
        states_of(Looped(), 1, make_batch())
    read, runs = states_of(Looped(), 1, make_batch(), spec=PolicySpec("x", run=2))
    assert torch.equal(read, runs[2])


class MeanFlow(Host):
    """The average velocity by a forward derivative, as in MeanFlow."""

    def trunk(self, x):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward derivative
            out, _ = torch.func.jvp(lambda y: super(MeanFlow, self).trunk(y), (x,), (torch.ones_like(x),))
        return out


def test_a_forward_derivative_keeps_the_graph():
    policy = MeanFlow()
    lara = attach_lara(policy.train(), OwnLam(), layer=2)
    policy(make_batch())
    lara.losses.align.backward()
    assert policy.flow_blocks[0].mlp[0].weight.grad.abs().sum() > 0
    assert lara.check(make_batch()).proven


class PerSample(Host):
    def trunk(self, x):
        return torch.func.vmap(lambda y: super(PerSample, self).trunk(y[None])[0], randomness="different")(x)


def test_vmap_is_refused():
    policy = PerSample().train()
    attach_lara(policy, OwnLam(), layer=2)
    with pytest.raises(TokenError, match=r"torch\.func\.vmap"):
        policy(make_batch())


def test_no_run_with_a_graph_is_still_an_error():
    class Frozen(Host):
        def trunk(self, x):
            with torch.no_grad():
                return super().trunk(x)

    policy = Frozen().train()
    attach_lara(policy, OwnLam(), layer=2)
    with pytest.raises(TapDetached):
        policy(make_batch())


def test_states_in_what_a_block_returns():
    x, y, weights = torch.zeros(2, 3, 4), torch.ones(2, 5, 4), torch.zeros(2, 2, 3, 3)
    for value in (
        x,
        (x,),
        (x, None),
        [x, weights],
        (None, weights, x),
        {"h": x, "cache": None},
        (x, torch.ones(2, 3, 4).long()),
    ):
        assert pick_state(value, None, "b") is x
    for value, state in (((x, y), 1), ((x, y), -1), ({"a": x, "b": y}, "b")):
        assert pick_state(value, state, "b") is y
        with pytest.raises(TokenError, match="2 hidden states"):
            pick_state(value, None, "b")
    for value, state in (((x, y), 2), ({"a": x}, "b"), ((x, None), 1), ((x,), "hidden")):
        with pytest.raises(TokenError, match="has no hidden state"):
            pick_state(value, state, "blocks.3")
    assert pick_state(None, None, "b") is pick_state((1, "a"), None, "b") is None
    flat = torch.zeros(2, 4)
    assert pick_state((flat, 1), None, "b") is flat


@dataclasses.dataclass
class Returned:
    hidden: torch.Tensor
    other: torch.Tensor | None = None


def test_states_in_a_dataclass_and_beside_attention_weights():
    x, y = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    assert pick_state(Returned(x), None, "b") is pick_state(Returned(x, y), "hidden", "b") is x
    with pytest.raises(TokenError, match=r"'hidden': .*'other': "):
        pick_state(Returned(x, y), None, "b")
    with pytest.raises(TokenError, match="has no hidden state 'nothing'"):
        pick_state(Returned(x, y), "nothing", "b")
    weights = torch.zeros(2, 3, 3)
    assert pick_state((weights, x), None, "b", 4) is x
    with pytest.raises(TokenError, match="2 hidden states"):
        pick_state((weights, x), None, "b")
    with pytest.raises(TokenError, match="2 hidden states"):
        pick_state((x, y), None, "b", 4)


class CallsItself(Host):
    """A guess by its own forward comes first."""

    def forward(self, batch, guess=True):
        if guess:
            with torch.no_grad():
                self(batch, guess=False)
        return super().forward(batch)


def test_a_forward_that_calls_itself():
    read, runs = states_of(CallsItself(), 1, make_batch())
    assert torch.equal(read, runs[1])


class SplitDraws(Host):
    """Two noise draws of each sample, interleaved, the head run on parts of three rows."""

    def forward(self, batch):
        return {"loss": self.loss_of(batch["state"].repeat_interleave(2, 0), batch["action"].repeat_interleave(2, 0))}

    def trunk(self, x):
        return torch.cat([super(SplitDraws, self).trunk(part) for part in x.split(2)])


def test_draws_in_parts_are_joined():
    read, runs = states_of(SplitDraws(), 1, make_batch(), spec=PolicySpec("x", draws="interleave"))
    assert torch.equal(read, torch.cat(runs[:4]))


def test_states_in_what_a_block_is_given():
    x, y = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    assert input_state((x, y), {}, None, "b") is x
    assert input_state((), {"context": y, "hidden_states": x}, None, "b") is x
    assert input_state((), {"context": y, "x": x}, "x", "b") is x
    assert input_state((None,), {"x": x}, None, "b") is x
    with pytest.raises(TokenError, match="2 hidden states"):
        input_state((), {"context": y, "x": x}, None, "b")


def test_runs_by_hand():
    spec = PolicySpec("x")
    a, b = torch.zeros(3, 2, 4), torch.ones(1, 2, 4)
    joined, kept = join_runs((a, b), pairs=4, shared=(0, 1), spec=spec)
    assert torch.equal(joined, torch.cat([a, b]))
    assert kept == [0, 1]
    first = torch.zeros(2, 3, 4)
    joined, _ = join_runs((first, first[:, :1]), pairs=4, shared=(0, 1), spec=PolicySpec("x", layout="sequence"))
    assert joined.shape == (2, 4, 4)
    with pytest.raises(TokenError, match="stands 2 times"):
        join_runs((a, a, a), pairs=3, shared=(1, 2), spec=spec)
    with pytest.raises(TokenError, match=r"rows \[3, 1\]"):
        join_runs((a, b), pairs=5, shared=(0, 1), spec=spec)
    with pytest.raises(TokenError, match=r"rows \[3, 1\]"):  # of different lengths
        join_runs((a, torch.ones(1, 3, 4)), pairs=4, shared=(0, 1), spec=spec)


def test_batch_is_the_toys():
    assert make_batch()["action"].shape[:2] == (BATCH, HORIZON)
