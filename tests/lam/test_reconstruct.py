"""A part of the pairs is reconstructed: the loss and its gradient are those of all pairs in expectation, at less work."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from helpers.models import TINY, build
from helpers.ranks import run_ranks
from helpers.toys import DitPolicy, OwnLam, gradients, make_batch
from test_model import SMALL, frames
from torch.nn.parallel import DistributedDataParallel

from lara_adapter import (
    AdapterFormatError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    attach_lara,
    load_lara,
)
from lara_adapter.lam import model as lam_model
from lara_adapter.lam.draws import draw_rows

CPU = torch.device("cpu")


class Distance(torch.nn.Module):
    """In place of LPIPS: nonlinear in the pixels of a sample."""

    def forward(self, predicted, target):
        return (predicted - target).abs().amax(dim=(1, 2, 3)).sqrt()


def small(**changes):
    torch.manual_seed(0)
    lam = LatentActionModel(LatentActionConfig(**{**SMALL, **changes})).train()
    lam.perceptual = Distance()
    lam.config = dataclasses.replace(lam.config, perceptual_weight=0.5)
    return lam


def tiny():
    torch.manual_seed(0)
    return LatentActionModel(LatentActionConfig.tiny(**TINY))


def step(lam, pair, valid, **part):
    """The output, and the gradient of every parameter; the codebook's statistics do not move."""
    lam = copy.deepcopy(lam)
    out = lam(*pair, valid, **part)
    out.loss.backward()
    return out, {name: p.grad for name, p in lam.named_parameters()}


# ---------------------------------------------------------------------- the draw


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_every_subset_is_drawn_equally_often(share):
    size, draws = 6, 12_000
    count = max(1, round(share * size))
    seen = dict.fromkeys(itertools.combinations(range(size), count), 0)
    for draw in range(draws):
        seen[tuple(sorted(draw_rows(size, share, draw, None, CPU).tolist()))] += 1
    expected = draws / len(seen)
    # Pearson's statistic: mean n - 1, standard deviation sqrt(2 (n - 1))
    statistic = sum((number - expected) ** 2 / expected for number in seen.values())
    assert statistic < len(seen) - 1 + 4 * math.sqrt(2 * (len(seen) - 1))


def test_valid_pairs_come_first_and_each_of_them_equally_often():
    valid = torch.tensor([True, False, True, True, False, True, True, False])
    counts = torch.zeros(8)
    for draw in range(4000):
        rows = draw_rows(8, 0.25, torch.tensor(draw), valid, CPU)
        assert len(rows) == len(rows.unique()) == 2
        counts[rows] += 1
    assert not counts[~valid].any()
    torch.testing.assert_close(counts[valid] / 4000, torch.full((5,), 0.4), atol=0.035, rtol=0)
    few = torch.tensor([False] * 7 + [True])
    for draw in range(20):
        assert 7 in draw_rows(8, 0.5, draw, few, CPU).tolist()


@pytest.mark.parametrize(
    ("size", "share", "count"), [(1, 0.25, 1), (2, 0.25, 1), (16, 0.25, 4), (30, 0.1, 3), (7, 0.99, 7)]
)
def test_how_many(size, share, count):
    assert len(draw_rows(size, share, 5, None, CPU)) == count
    assert len(draw_rows(size, share, 5, torch.zeros(size, dtype=torch.bool), CPU)) == count


def test_equal_numbers_draw_equal_rows_and_the_hosts_random_numbers_stay():
    state = torch.get_rng_state()
    rows = [draw_rows(64, 0.25, draw, None, CPU).tolist() for draw in (3, torch.tensor(3), 4, 2**31 + 3, 2**40)]
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows[1:]}) == 4
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("over_copy", [False, True])
@pytest.mark.parametrize("valid", [None, [True, False, True, True, True, False]])
def test_the_mean_over_all_draws_is_the_full_loss_and_its_gradient(over_copy, valid, monkeypatch):
    lam, pair = small(reconstruction_over_copy=over_copy), frames(6)
    flags = None if valid is None else torch.tensor(valid)
    full, expected = step(lam, pair, flags)
    places = range(6) if valid is None else [place for place in range(6) if valid[place]]
    outputs, found = [], []
    for subset in itertools.combinations(places, 3):
        monkeypatch.setattr(lam_model, "draw_rows", lambda *a, rows=subset: torch.tensor(rows))
        output, gradient = step(lam, pair, flags, reconstruct=0.5)
        outputs.append(output)
        found.append(gradient)
    assert len({round(output.loss.item(), 6) for output in outputs}) > 1
    for name in ("loss", "reconstruction_loss", "copy_loss", "perceptual_loss", "codebook_loss", "commitment_loss"):
        mean = torch.stack([getattr(output, name) for output in outputs]).mean()
        torch.testing.assert_close(mean, getattr(full, name), rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in expected.items():
        mean = torch.stack([each[name] for each in found]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_estimate_converges_over_steps():
    lam, pair = small().eval(), frames(8)
    with torch.no_grad():
        full = lam(*pair).loss.item()
        found = [lam(*pair, reconstruct=0.25, draw=draw).loss.item() for draw in range(400)]
    spread = torch.tensor(found).std().item()
    assert spread > 0
    assert abs(sum(found) / 400 - full) < 4 * spread / 20


def test_all_are_encoded_and_only_a_part_is_predicted():
    lam, pair = small(), frames(8)
    seen = []
    lam.forward_dynamics.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), len(args[1]))))
    full = lam(*pair)
    out = lam(*pair, reconstruct=0.25, draw=7)
    assert seen == [(8, 8), (2, 2)]
    assert full.reconstructed is None
    assert torch.equal(out.latent.continuous, full.latent.continuous)
    assert torch.equal(out.copy_loss, full.copy_loss)
    torch.testing.assert_close(out.reconstruction, full.reconstruction[out.reconstructed], rtol=1e-5, atol=1e-6)


def test_with_all_of_them_it_is_the_papers_loss_to_the_bit():
    lam, pair = small(), frames()
    assert torch.equal(lam.eval()(*pair, reconstruct=1, draw=9).loss, lam(*pair).loss)


def test_no_valid_pair_keeps_every_parameter_with_zero_gradient():
    out, found = step(small(), frames(), torch.zeros(4, dtype=torch.bool), reconstruct=0.25)
    assert out.loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("share", [0, -0.5, 1.5, math.nan, True, "half"])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(LaraArgumentError, match=r"reconstruct=.*a number in \(0, 1\] is expected"):
        small()(*frames(), reconstruct=share)
    with pytest.raises(LaraArgumentError, match=r"attach_lara: reconstruct=.*a number in \(0, 1\] is expected"):
        attach_lara(DitPolicy(), tiny(), reconstruct=share)


# ---------------------------------------------------------------------- with a policy


def attached(**arguments):
    return build(lam="tiny", **{"reconstruct": 0.25, **arguments})


def test_each_step_draws_anew_from_all_views_and_leaves_the_noise_of_the_policy():
    policy, lara = attached()
    drawn = []
    lara.lam.register_forward_hook(lambda module, args, output: drawn.append(output.reconstructed.tolist()))
    batch, state = make_batch(size=8, views=2), torch.get_rng_state()
    for _ in range(12):
        policy(batch)["loss"].backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert {len(rows) for rows in drawn} == {4}
    assert len({tuple(rows) for rows in drawn}) > 8
    assert set(itertools.chain(*drawn)) == set(range(16))
    assert lara.metrics()["lam_loss"] > 0


def test_a_saved_run_draws_on_as_if_it_had_not_stopped(tmp_path):
    def run(policy, lara, steps):
        rows = []
        handle = lara.lam.register_forward_hook(lambda module, args, output: rows.append(output.reconstructed.tolist()))
        for number in steps:
            policy(make_batch(size=8, seed=number))["loss"].backward()
        handle.remove()
        return rows

    policy, lara = attached()
    whole = run(policy, lara, range(3))
    lara.save_pretrained(tmp_path)
    rest = run(policy, lara, range(3, 6))
    policy = build()[0]
    policy.lara.detach()
    again = load_lara(policy, tmp_path)
    assert again.config.reconstruct == 0.25
    assert run(policy, again, range(3, 6)) == rest
    assert whole[0] != rest[0]
    assert "25%, drawn at each step" in (tmp_path / "README.md").read_text()
    (tmp_path / "lara_config.json").write_text(
        (tmp_path / "lara_config.json").read_text().replace('"reconstruct": 0.25', '"reconstruct": 2.0')
    )
    again.detach()
    with pytest.raises(AdapterFormatError, match=r"reconstruct=2\.0"):
        load_lara(policy, tmp_path)


def test_a_lam_that_cannot_is_refused_unless_it_is_frozen():
    with pytest.raises(LaraArgumentError, match=r"OwnLam does not take draw and reconstruct"):
        attach_lara(DitPolicy(), OwnLam(), reconstruct=0.5)
    attach_lara(DitPolicy(), OwnLam(), reconstruct=0.5, train_lam=False)


@pytest.mark.parametrize("views", [pytest.param(None, marks=pytest.mark.long), 2])
def test_compiled_in_one_graph_it_is_the_same(views):
    torch._dynamo.reset()
    policy, _ = attached()
    other, _ = attached()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        batch = make_batch(size=8, seed=seed, views=views)
        batch["lara_frames_valid"] = torch.tensor([True] * 6 + [False] * 2)
        policy.zero_grad()
        other.zero_grad()
        policy(batch)["loss"].backward()
        compiled(batch)["loss"].backward()
        found = gradients(other)
        for name, gradient in gradients(policy).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert policy.lara.step == other.lara.step == 3
    torch._dynamo.reset()


def _on_a_rank(rank, find_unused):
    policy, lara = attached()
    drawn = []
    lara.lam.register_forward_hook(lambda module, args, output: drawn.append(len(output.reconstructed)))
    model = DistributedDataParallel(policy, find_unused_parameters=find_unused)
    for number in range(3):  # a parameter left out of one step fails in the next
        batch = make_batch(size=8, seed=10 * rank + number)
        batch["lara_frames_valid"] = torch.full((8,), rank == 0 or number != 1)
        policy.zero_grad()
        model(batch)["loss"].backward()
    return drawn, {name: g for name, g in gradients(policy).items() if g is not None}


@pytest.mark.parametrize("find_unused", [False, True])
def test_ranks_reconstruct_equally_many_and_agree(find_unused):
    (mine, first), (theirs, second) = run_ranks(_on_a_rank, find_unused)
    assert mine == theirs == [2, 2, 2]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == second.keys()
