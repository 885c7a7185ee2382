import pytest
import torch
from helpers.toys import HORIZON, DitPolicy, OwnLam, make_batch

from lara_adapter import LaraArgumentError, PolicySpec, TokenError, attach_lara
from lara_adapter.tokens import ActionSteps, action_steps, batch_keys, check_rule, select_token, token_positions

HIDDEN = torch.arange(3 * 7 * 2, dtype=torch.float32).reshape(3, 7, 2)  # 1 state token + 6 action tokens
VALID = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def test_last_valid_is_the_last_step_that_is_not_padding():
    token, counts = select_token(HIDDEN, ActionSteps(VALID), "last_valid", "last", None)
    assert torch.equal(token[0], HIDDEN[0, 6])
    assert torch.equal(token[1], HIDDEN[1, 1 + 1])
    assert counts.tolist() == [True, True, False]


def test_action_tokens_at_the_front():
    token, _ = select_token(HIDDEN, ActionSteps(VALID), "last_valid", "first", None)
    assert torch.equal(token[0], HIDDEN[0, 5])
    assert torch.equal(token[1], HIDDEN[1, 1])


def test_mean_valid_averages_exactly_the_valid_steps():
    token, counts = select_token(HIDDEN, ActionSteps(VALID), "mean_valid", "last", None)
    assert torch.equal(token[0], HIDDEN[0, 1:].mean(0))
    assert torch.equal(token[1], HIDDEN[1, 1:3].mean(0))
    assert counts.tolist() == [True, True, False]


@pytest.mark.parametrize(("rule", "position"), [("last", 6), (0, 1), (1, 2), (-1, 6), (-6, 1)])
def test_fixed_steps(rule, position):
    token, counts = select_token(HIDDEN, ActionSteps(VALID), rule, "last", None)
    assert torch.equal(token, HIDDEN[:, position])
    # a fixed step that is padding in a row does not count there
    assert counts.tolist() == VALID[:, position - 1].tolist()


def test_callable_rule():
    token, counts = select_token(HIDDEN, None, lambda hidden, batch: hidden[:, batch], "last", 3)
    assert torch.equal(token, HIDDEN[:, 3])
    assert counts is None
    with pytest.raises(TokenError, match=r"returned \[3, 7, 2\], but \[3, 2\] is expected"):
        select_token(HIDDEN, None, lambda hidden, batch: hidden, "last", None)


def test_without_action_keys_the_last_token_is_the_last_of_the_sequence():
    assert torch.equal(select_token(HIDDEN, None, "last_valid", "last", None)[0], HIDDEN[:, -1])
    for rule, where in (("mean_valid", "last"), (2, "last"), ("last_valid", "first")):
        with pytest.raises(TokenError, match="action_mask, action_is_pad, action, actions"):
            select_token(HIDDEN, None, rule, where, None)


def test_padding_marks_of_the_hosts():
    mask = VALID[..., None] * torch.tensor([1.0, 0.0])  # GR00T: valid step and dimension
    assert torch.equal(action_steps({"action_mask": mask}).valid, VALID)
    assert torch.equal(action_steps({"action_mask": VALID.float()}).valid, VALID)
    assert torch.equal(action_steps({"action_is_pad": ~VALID}).valid, VALID)  # LeRobot
    assert action_steps({"action": torch.zeros(3, 6, 2)}).valid.all()
    assert action_steps({"actions": torch.zeros(3, 6, 2)}).valid.shape == (3, 6)
    assert action_steps({"state": torch.zeros(3)}) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"action_mask": torch.zeros(6)}, r"action_mask has shape \[6\]"),
        ({"action_is_pad": torch.zeros(1, 2, 3)}, r"action_is_pad has shape \[1, 2, 3\]"),
        ({"action": torch.zeros(3, 6)}, r"action has shape \[3, 6\]"),
    ],
)
def test_wrong_marks(batch, message):
    with pytest.raises(TokenError, match=message):
        action_steps(batch)


def test_wrong_states():
    with pytest.raises(TokenError, match=r"shape \[3, 14\], but \[B, sequence, width\]"):
        select_token(HIDDEN.flatten(1), ActionSteps(VALID), "last", "last", None)
    with pytest.raises(TokenError, match="3 rows of 7 tokens, but the batch has 2 rows of 6"):
        select_token(HIDDEN, ActionSteps(VALID[:2]), "last", "last", None)
    with pytest.raises(TokenError, match=r"token=6, but the action chunk has 6 steps; use -6\.\.5"):
        select_token(HIDDEN, ActionSteps(VALID), 6, "last", None)


@pytest.mark.parametrize("rule", ["first", 1.0, None, True])
def test_unknown_rules(rule):
    with pytest.raises(LaraArgumentError, match="'last_valid', 'mean_valid', 'last'"):
        check_rule(rule)


def test_padded_steps_get_no_alignment_gradient():
    """At the last block nothing mixes tokens any more: the alignment may reach only each sample's last valid step."""
    policy = DitPolicy().train()
    lara = attach_lara(policy, OwnLam(), layer=-1, lam_weight=0)
    batch = make_batch(padded=True)
    policy(batch)
    hidden = policy.hidden_states[-1]
    (gradient,) = torch.autograd.grad(lara.losses.total, hidden)
    touched = gradient.abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    for i in range(4):
        expected[i, 1 + HORIZON - 1 - i] = True
    assert torch.equal(touched, expected)


def test_two_horizons_in_one_batch_and_an_action_that_is_all_padding():
    policy = DitPolicy().train()
    lara = attach_lara(policy, OwnLam())
    batch = make_batch()
    batch["action_mask"][0] = 0
    policy(batch)
    assert lara.metrics()["valid_fraction"] == 0.75


ACTION = torch.zeros(3, 6, 2)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 2), (3, 1, 2), (1, 1, 2)])
def test_a_mask_over_dimensions_is_broadcast_over_the_steps(shape):
    mask = torch.zeros(shape)
    mask[..., 0] = 1
    assert action_steps({"action": ACTION, "action_mask": mask}).valid.tolist() == [[True] * 6] * 3
    assert not action_steps({"action": ACTION, "action_mask": torch.zeros(shape)}).valid.any()


def test_marks_over_steps_and_dimensions():
    mask = VALID[..., None] * torch.tensor([1.0, 0.0])
    assert torch.equal(action_steps({"action": ACTION, "action_mask": mask}).valid, VALID)
    assert torch.equal(action_steps({"action": ACTION, "action_mask": VALID[..., None]}).valid, VALID)
    padding = ~(VALID[..., None] & torch.tensor([True, False]))  # a dimension that the robot lacks is padding too
    assert torch.equal(action_steps({"action": ACTION, "action_is_pad": padding}).valid, VALID)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (2, 6, 2), (4,), (3, 6, 3)])
@pytest.mark.parametrize("key", ["action_mask", "action_is_pad"])
def test_marks_that_fit_neither_steps_nor_dimensions_are_refused(key, shape):
    with pytest.raises(TokenError, match=rf"{key} has shape .* but action has \[3, 6, 2\]"):
        action_steps({"action": ACTION, key: torch.ones(shape)})


def test_a_mask_of_one_step_without_an_action_is_refused():
    with pytest.raises(TokenError, match="over dimensions or over one step"):
        action_steps({"action_mask": torch.ones(3, 1, 2)})
    spec = PolicySpec("rdt", action="action_gt")
    assert action_steps({"action_gt": ACTION, "action_mask": torch.ones(3, 1, 2)}, spec).valid.shape == (3, 6)


def test_keys_of_the_row():
    spec = PolicySpec("x", action="chunk", padding="is_pad", mask="real")
    assert torch.equal(action_steps({"chunk": ACTION, "is_pad": ~VALID}, spec).valid, VALID)
    assert torch.equal(action_steps({"chunk": ACTION, "real": VALID}, spec).valid, VALID)
    assert action_steps({"action": ACTION, "action_is_pad": ~VALID}, spec) is None
    assert batch_keys(spec) == ("chunk", "real", "is_pad")
    assert batch_keys(PolicySpec("x", action_tokens="token"))[-2:] == ("input_ids", "token")


def test_action_tokens_inside_a_longer_sequence():
    ids = torch.tensor([[7, 7, 7, 0, 0, 0, 0], [0, 0, 7, 7, 7, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    positions = token_positions({"input_ids": ids}, 7)
    for where in ("token", lambda batch: batch["input_ids"] == 7):
        assert torch.equal(token_positions({"input_ids": ids, "token": torch.tensor([7, 7, 7])}, where), positions)
    steps = ActionSteps(torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool))
    for rule, at in (("last_valid", (2, 3)), ("last", (2, 4)), (0, (0, 2)), (-3, (0, 2))):
        token, counts = select_token(HIDDEN, steps, rule, 7, None, positions)
        assert torch.equal(token[0], HIDDEN[0, at[0]])
        assert torch.equal(token[1], HIDDEN[1, at[1]])
        assert counts.tolist() == [True, rule != "last", False]
    mean, _ = select_token(HIDDEN, steps, "mean_valid", 7, None, positions)
    assert torch.equal(mean[1], HIDDEN[1, 2:4].mean(0))
    assert torch.equal(select_token(HIDDEN, None, "last_valid", 7, None, positions)[0][1], HIDDEN[1, 4])


def test_action_tokens_that_cannot_be_located():
    ids = torch.zeros(3, 7, dtype=torch.long)
    for batch, where, said in (
        ({}, 7, "no input_ids"), ({"input_ids": ids}, "token", "no 'token'"), ({"input_ids": ids[0]}, 7, "no input_ids"),
    ):  # fmt: skip
        with pytest.raises(TokenError, match=said):
            token_positions(batch, where)
    with pytest.raises(TokenError, match=r"callable returned torch.int64 \[3, 7\], but bool \[B, S\]"):
        token_positions({}, lambda batch: ids)
    with pytest.raises(TokenError, match=r"located in \[3, 5\] positions"):
        select_token(HIDDEN, None, "last_valid", 7, None, torch.ones(3, 5, dtype=torch.bool))
