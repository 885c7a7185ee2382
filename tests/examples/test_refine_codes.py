"""What codes say about actions: known values, nothing from chance, and a LAM from a joint run that reads as before."""

from __future__ import annotations

import math

import pytest
import torch
from test_mini_vla import make_batch

from examples.mini_vla import MiniVLA
from examples.refine_lam.codes import (
    code_action_information,
    encode,
    held_out_information,
    movement_kinds,
    permuted_information,
    plug_in_information,
)
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara


def draw(number: int, high: int, seed: int) -> torch.Tensor:
    return torch.randint(high, (number,), generator=torch.Generator().manual_seed(seed))


def test_plug_in_of_a_known_table():
    # a noisy channel of one fair bit, flipped once in eight: 1 - H(1/8) bits, exactly so in the frequencies
    codes = torch.tensor([0] * 8 + [1] * 8)
    kinds = torch.tensor([0] * 7 + [1] + [1] * 7 + [0])
    entropy = -(1 / 8) * math.log2(1 / 8) - (7 / 8) * math.log2(7 / 8)
    assert plug_in_information(codes, kinds) == pytest.approx(1 - entropy)
    assert plug_in_information(codes, codes) == pytest.approx(1)
    assert plug_in_information(codes, torch.zeros(16, dtype=torch.long)) == pytest.approx(0)


def test_both_corrections_find_a_known_value_among_128_codes():
    # codes 0..127, kind = code % 8, but one third of the kinds are drawn anew: known in closed form
    number, codes = 6000, draw(6000, 128, 0)
    kinds = torch.where(draw(number, 3, 1) > 0, codes % 8, draw(number, 8, 2))
    right = 2 / 3 + 1 / 24
    wrong = 1 / 24
    truth = 3 + right * math.log2(right) + 7 * wrong * math.log2(wrong)
    plug_in, chance = plug_in_information(codes, kinds), permuted_information(codes, kinds)
    assert plug_in > truth + 0.05  # why a correction is needed
    assert plug_in - chance == pytest.approx(truth, abs=0.1)
    bound = held_out_information(codes, kinds, torch.arange(number) // 60)
    assert truth - 0.2 < bound < truth + 0.05


def test_independent_codes_say_nothing_after_correction():
    codes, kinds = draw(1500, 128, 0), draw(1500, 8, 1)
    plug_in = plug_in_information(codes, kinds)
    assert plug_in > 0.3  # chance alone
    assert plug_in - permuted_information(codes, kinds) == pytest.approx(0, abs=0.06)  # 3 standard deviations
    assert -0.3 < held_out_information(codes, kinds, torch.arange(1500) // 30) < 0.02


def test_only_whole_episodes_correct_for_rows_that_resemble_each_other():
    # codes and kinds that stand still in each episode and know nothing of each other
    episodes = torch.arange(40).repeat_interleave(30)
    codes, kinds = draw(40, 64, 0)[episodes], draw(40, 8, 1)[episodes]
    assert plug_in_information(codes, kinds) - permuted_information(codes, kinds) > 1
    assert held_out_information(codes, kinds, episodes) < 0.02


def test_kinds_of_movement_are_its_clusters():
    centres = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0]])
    truth = draw(200, 4, 0)
    movement = centres[truth] + 0.05 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    kinds = movement_kinds(movement, 4)
    assert torch.equal(kinds, movement_kinds(movement, 4))
    assert plug_in_information(kinds, truth) == pytest.approx(plug_in_information(truth, truth))


def make_table(rows: int = 2000) -> dict[str, torch.Tensor]:
    task = torch.arange(rows) // (rows // 2)
    movement = torch.randn(rows, 1, 4, generator=torch.Generator().manual_seed(3)).sign().expand(-1, 16, -1)
    return {
        "task": task,
        "valid": torch.arange(rows) % 10 != 9,
        "action": movement,
        "episode": torch.arange(rows) // 10,
    }


def test_information_is_counted_within_tasks_and_only_over_pairs():
    table = make_table()
    truth = movement_kinds(table["action"][:, 0, :3])
    knows, of_task = truth[:, None], table["task"][:, None]
    nonsense = torch.where(table["valid"][:, None], knows, 127)  # rows without a pair hold anything
    found = code_action_information(torch.cat([nonsense, of_task], 1), table)
    assert found["best_token"] > 0.8 * found["entropy"]
    only_task = code_action_information(of_task, table)
    assert only_task["held_out"] == pytest.approx(0, abs=0.02)
    assert only_task["corrected"] == pytest.approx(0, abs=0.02)
    assert found["corrected"] == pytest.approx(found["plug_in"] - found["permuted"])
    assert found["held_out"] < found["best_token"]


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_a_lam_taken_out_of_a_joint_run_reloads_and_encodes_the_same(alignment, tmp_path):
    policy, lam = MiniVLA(), LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=1))
    lara = attach_lara(policy, lam, layer=-3, alignment=alignment)
    batch = make_batch(4)
    batch["lara_frames"] = torch.randint(0, 256, (4, 2, 3, 64, 64), dtype=torch.uint8)
    frames = batch["lara_frames"].unbind(1)
    untouched = lara.lam.encode(*frames).continuous.detach()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    for _ in range(3):
        optimizer.zero_grad()
        policy(batch)["loss"].backward()
        optimizer.step()
    lara.lam.save_pretrained(tmp_path / "attached")
    lara.detach()
    lara.lam.save_pretrained(tmp_path / "detached")
    with torch.no_grad():
        expected = lara.lam.encode(*frames)
    assert not torch.equal(expected.continuous, untouched)  # the joint run trained it
    for name in ("attached", "detached"):
        loaded = LatentActionModel.from_pretrained(tmp_path / name)
        with torch.no_grad():
            found = loaded.encode(*frames)
        assert torch.equal(found.continuous, expected.continuous)
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(loaded.predict(frames[0], found), lara.lam.predict(frames[0], expected))


def test_encodes_pairs_and_leaves_other_rows_empty(tmp_path):
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=0)).eval()
    lam.save_pretrained(tmp_path / "lam")
    image = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    table = {"image": image, "future": torch.tensor([2, 3, 2, 5, 4, 5])}
    table["valid"] = table["future"] != torch.arange(6)
    found = encode(tmp_path / "lam", table)
    with torch.no_grad():
        expected = lam.encode(image[[0, 1, 3]], image[[2, 3, 5]])
    assert torch.allclose(found["z"][[0, 1, 3]], expected.continuous.flatten(1), atol=1e-5)
    assert torch.equal(found["codes"][[0, 1, 3]], expected.indices)
    assert not found["z"][[2, 4, 5]].any()
