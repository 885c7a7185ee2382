"""The latent-token policy: it learns a language, writes causally, and acts on what it wrote."""

from __future__ import annotations

import torch

from examples.refine_lam.moto_gpt import MotoGPT, MotoGPTConfig
from examples.refine_lam.moto_train import code_scores, optimise

SMALL = {"width": 32, "depth": 2, "heads": 2, "codes": 4, "codebook_size": 12}


def make_language(rows: int = 64) -> dict[str, torch.Tensor]:
    """The task gives the first code, each code the next (+5, modulo 12), the last one the action."""
    random = torch.Generator().manual_seed(0)
    task = torch.randint(2, (rows,), generator=random)
    first = 3 * task + 1
    codes = (first[:, None] + 5 * torch.arange(4)) % 12
    action = torch.where(codes[:, -1:, None] == 4, -0.8, 0.8).expand(-1, 16, 4).contiguous()
    return {
        "image": torch.randint(0, 256, (rows, 3, 64, 64), generator=random, dtype=torch.uint8),
        "task": task,
        "state": torch.zeros(rows, 4),
        "codes": codes,
        "valid": torch.ones(rows, dtype=torch.bool),
        "action": action,
        "action_mask": torch.ones(rows, 16, 4),
    }


VIDEO = ("image", "task", "codes", "valid")


def test_learns_a_synthetic_language_from_tokens_alone_and_then_to_act():
    table, policy = make_language(), MotoGPT(MotoGPTConfig(**SMALL))
    before = code_scores(policy.eval(), table)
    head = policy.action_head.weight.clone()
    optimise(policy, table, VIDEO, 8, 5e-3, 60, 0, lambda count: None, {})
    after = code_scores(policy.eval(), table)
    assert before["code_loss"] > 1.5 > 0.1 > after["code_loss"]
    assert after["codes_right"] == 1
    assert torch.equal(policy.generate(table["image"], table["task"]), table["codes"])
    torch.testing.assert_close(policy.action_head.weight, head)  # no action was asked for
    history: dict[str, list[float]] = {}
    optimise(policy, table, (*VIDEO, "action", "action_mask"), 8, 3e-3, 60, 0, lambda count: None, history)
    action = policy.eval().get_action(table)
    assert action.shape == (64, 16, 4)
    assert action.abs().max() <= 1
    assert (action - table["action"]).square().mean() < 0.1
    assert history.keys() == {"finetune_loss", "finetune_code_loss", "finetune_action_loss"}


@torch.no_grad()
def test_no_code_sees_a_later_one():
    policy, table = MotoGPT(MotoGPTConfig(**SMALL)).eval(), make_language(5)
    seen = policy.backbone([table["image"]], table["task"])
    logits, action = policy.run(seen, table["codes"], queries=True)
    for place in range(4):
        changed = table["codes"].clone()
        changed[:, place] = (changed[:, place] + 1) % 12
        other, other_action = policy.run(seen, changed, queries=True)
        assert torch.equal(other[:, : place + 1], logits[:, : place + 1])
        assert not torch.equal(other[:, place + 1], logits[:, place + 1])
        assert not torch.equal(other_action, action)  # the queries see every code
    # a prefix gives the same as the whole
    for number in range(4):
        prefix, none = policy.run(seen, table["codes"][:, :number], queries=False)
        torch.testing.assert_close(prefix, logits[:, : number + 1], rtol=1e-4, atol=1e-5)
        assert none.shape[1] == 0


@torch.no_grad()
def test_masked_queries_do_not_see_the_codes():
    policy, table = MotoGPT(MotoGPTConfig(**SMALL)).eval(), make_language(4)
    seen, see = policy.backbone([table["image"]], table["task"]), torch.tensor([True, False, True, False])
    action = policy.run(seen, table["codes"], True, see)[1]
    other = policy.run(seen, (table["codes"] + 1) % 12, True, see)[1]
    assert torch.equal(action[~see], other[~see])
    assert (action[see] != other[see]).any()


def test_rows_without_codes_count_only_for_the_actions():
    table, policy = make_language(8), MotoGPT(MotoGPTConfig(**SMALL, see_codes=1.0))
    table["valid"][4:] = False
    losses = {name: value.detach() for name, value in policy(table).items()}
    changed = {**table, "codes": table["codes"].clone()}
    changed["codes"][4:] = 0
    again = {name: value.detach() for name, value in policy(changed).items()}
    for name in ("code_loss", "action_loss", "loss"):
        torch.testing.assert_close(losses[name], again[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses["loss"], losses["code_loss"] + 100 * losses["action_loss"])
    nothing = policy({**table, "valid": torch.zeros(8, dtype=torch.bool)})
    assert not nothing["code_loss"].detach().any()


def test_the_reference_without_tokens_never_uses_them(tmp_path):
    table, policy = make_language(8), MotoGPT(MotoGPTConfig(**SMALL, use_codes=False))
    losses = {name: value.detach() for name, value in policy(table).items()}
    torch.testing.assert_close(losses["loss"], 100 * losses["action_loss"])
    policy(table)["loss"].backward()
    assert not policy.code_head.weight.grad.any()
    policy.eval().save(tmp_path / "policy.pt")
    loaded = MotoGPT.load(tmp_path / "policy.pt")
    assert loaded.config == policy.config
    assert torch.equal(loaded.get_action(table), policy.get_action(table))
