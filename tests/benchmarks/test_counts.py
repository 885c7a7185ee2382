"""What a training step may do, in counts of torch's own: LARA's cost cannot creep back unseen.

A bound is what was counted (torch 2.13; `python -m benchmarks.speed.counts`) and a tenth more, for other versions of torch.
A change that needs more says so by raising the bound.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.counts import Counts, count, demo_steps
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.lam import VectorQuantizer

SLACK = 1.1


def counted(views: int) -> dict[str, Counts]:
    found = {}
    for way, step in demo_steps(views, batch=4):
        step()
        found[way] = count(step)[0]
    return found


@pytest.fixture(scope="module")
def one_view() -> dict[str, Counts]:
    return counted(1)


@pytest.fixture(scope="module")
def four_views() -> dict[str, Counts]:
    return counted(4)


@pytest.mark.parametrize(
    ("way", "operations"),
    [("frozen", 157), ("joint", 448), ("joint, contrastive", 495), ("joint, reconstruct=0.25", 485)],
)
def test_operations_beyond_the_policys(one_view, way, operations):
    assert one_view[way].operations - one_view["alone"].operations <= SLACK * operations


def test_an_idle_adapter_does_nothing(one_view):
    assert one_view["idle"] == one_view["alone"]


@pytest.mark.parametrize("way", ["frozen", "joint", "joint, contrastive", "joint, reconstruct=0.25"])
def test_a_step_waits_for_one_value_at_most(one_view, way):
    assert one_view[way].synchronisations - one_view["alone"].synchronisations <= 1


@pytest.mark.parametrize("way", ["frozen", "joint", "joint, contrastive", "joint, reconstruct=0.25"])
def test_views_share_one_pass(one_view, four_views, way):
    assert four_views[way].operations <= one_view[way].operations + 10
    assert four_views[way].synchronisations == one_view[way].synchronisations
    flop = [found[way].flop - found["alone"].flop for found in (one_view, four_views)]
    assert flop[1] <= 4 * flop[0]
    allocated = [found[way].allocated - found["alone"].allocated for found in (one_view, four_views)]
    assert allocated[1] <= 4 * allocated[0]


def test_a_part_of_the_pairs_costs_a_part_of_the_forward_dynamics(one_view):
    """The arithmetic to the FLOP: three quarters of what is done without an encoder and an inverse dynamics model."""
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=0)).train()
    frames, tokens = torch.rand(4, 3, 64, 64), torch.randn(4, *lam.latent_shape, requires_grad=True)
    flop = count(lambda: lam.forward_dynamics(frames, tokens).sum().backward())[0].flop
    saved = one_view["joint"].flop - one_view["joint, reconstruct=0.25"].flop
    assert saved == pytest.approx(0.75 * flop, rel=0.01)
    assert one_view["joint, reconstruct=0.25"].allocated < one_view["joint"].allocated


def step_of(lam: LatentActionModel, pairs: int) -> Counts:
    size = lam.config.image_size
    pair = [torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8) for _ in "tC"]
    valid = torch.ones(pairs, dtype=torch.bool)

    def work() -> None:
        lam.zero_grad(set_to_none=True)
        lam(*pair, valid).loss.backward()

    work()
    return count(work)[0]


def test_a_lams_own_step():
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=0)).train()
    found = step_of(lam, 8)
    assert found.operations <= SLACK * 322
    assert found.moves <= SLACK * 34
    assert found.allocated <= SLACK * 37.8e6
    assert found.synchronisations == 0
    larger = step_of(lam, 32)
    assert larger.operations == found.operations
    assert larger.allocated <= 4 * found.allocated


@pytest.mark.parametrize(("settings", "operations"), [({}, 50), ({"revive_every": 50}, 78)])
def test_a_quantisers_own_work(settings, operations):
    """With the paper's settings no code is ever set from data, and nothing is sought for it."""
    quantizer = VectorQuantizer(**settings).train()
    z, valid = torch.randn(8, 8, 32, requires_grad=True), torch.ones(8, dtype=torch.bool)
    assert count(lambda: quantizer(z, valid, want_terms=True))[0].operations <= SLACK * operations
    assert count(lambda: quantizer(z, want_loss=False))[0].operations <= 8
