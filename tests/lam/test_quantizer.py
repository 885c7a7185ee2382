"""The vector quantiser against brute force written here, and its life: warm-up, codes from data, revival, freezing."""

from __future__ import annotations

import pytest
import torch

from lara_adapter import LaraArgumentError
from lara_adapter.lam import VectorQuantizer

K, D, BETA = 9, 4, 0.25


def brute_force(z, codebook):
    """Nearest code of each token by loops in float64, and the two squared distances' mean."""
    indices = torch.zeros(z.shape[:2], dtype=torch.long)
    for b in range(z.shape[0]):
        for n in range(z.shape[1]):
            distances = [float(((z[b, n].double() - code.double()) ** 2).sum()) for code in codebook]
            indices[b, n] = min(range(len(codebook)), key=distances.__getitem__)
    return indices, ((z - codebook[indices]) ** 2).mean()


@pytest.fixture
def quantizer():
    vq = VectorQuantizer(K, D, BETA)
    with torch.no_grad():
        vq.weight.copy_(torch.randn(K, D))
    return vq.eval()


@pytest.mark.parametrize("legacy", [False, True])
def test_values_indices_and_loss(quantizer, legacy):
    quantizer.legacy_commitment = legacy
    z = torch.randn(5, 3, D)
    indices, distance = brute_force(z, quantizer.weight.detach())
    quantized, found, loss = quantizer(z)
    assert torch.equal(found, indices)
    assert torch.allclose(quantized, quantizer.weight[indices], atol=1e-6)
    assert loss.item() == pytest.approx((1 + BETA) * distance.item(), rel=1e-5)


@pytest.mark.parametrize(("legacy", "of_codes", "of_z"), [(False, 1.0, BETA), (True, BETA, 1.0)])
def test_gradients_by_hand(quantizer, legacy, of_codes, of_z):
    """Straight-through: the quantised tokens' gradient is z's; codebook and commitment move codes and z."""
    quantizer.legacy_commitment = legacy
    z = torch.randn(5, 3, D, requires_grad=True)
    upstream = torch.randn(5, 3, D)
    quantized, indices, loss = quantizer(z)
    ((quantized * upstream).sum() + loss).backward()
    codes = quantizer.weight.detach()[indices]
    scale = 2 / z.numel()
    assert torch.allclose(z.grad, upstream + of_z * scale * (z.detach() - codes), atol=1e-6)
    expected = torch.zeros(K, D).index_add_(0, indices.flatten(), of_codes * scale * (codes - z.detach()).flatten(0, 1))
    assert torch.allclose(quantizer.weight.grad, expected, atol=1e-6)


def test_invalid_samples_do_not_count(quantizer):
    z = torch.randn(4, 3, D)
    valid = torch.tensor([True, False, True, False])
    poisoned = z.clone()
    poisoned[~valid] = 1e9
    poisoned.requires_grad_()
    _, _, loss = quantizer(poisoned, valid)
    _, _, expected = quantizer(z[valid])
    assert torch.allclose(loss, expected)
    loss.backward()
    assert not poisoned.grad[~valid].any()
    assert poisoned.grad[valid].any()


def test_warm_up_returns_z_and_then_sets_the_codes_from_data():
    vq = VectorQuantizer(K, D, BETA, warmup_steps=3).train()
    for step in range(3):
        z = torch.randn(8, 4, D) + 5
        quantized, _, loss = vq(z)
        assert torch.equal(quantized, z), step
        assert loss.item() == 0
    seen = z.flatten(0, 1)
    z = torch.randn(8, 4, D) + 5
    quantized, indices, loss = vq(z)
    assert not torch.equal(quantized, z)
    assert loss > 0
    codes = vq.indices_to_codes(torch.arange(K))
    assert all((codes[k] - seen).abs().amax(1).min() < 1e-6 for k in range(K)), "a code is no latent of the data"
    assert len(codes.unique(dim=0)) == K
    assert len(indices.unique()) > K // 2


def test_dead_codes_are_revived_from_data_and_live_ones_stay():
    vq = VectorQuantizer(K, D, BETA, revive_every=5, usage_decay=0.1).train()
    with torch.no_grad():
        vq.weight.fill_(100.0)
        vq.weight[0], vq.weight[1] = 0.0, 1.0
    for _ in range(5):
        vq(torch.cat([torch.zeros(4, 2, D), torch.ones(4, 2, D)]) + 0.01 * torch.randn(8, 2, D))
    codes = vq.indices_to_codes(torch.arange(K)).detach()
    assert torch.equal(codes[0], torch.zeros(D))
    assert torch.equal(codes[1], torch.ones(D))
    assert (codes[2:] < 2).all(), "the dead codes did not move to the data"


def test_usage_and_perplexity():
    vq = VectorQuantizer(4, 1, BETA, usage_decay=0.0).train()
    with torch.no_grad():
        vq.weight.copy_(torch.arange(4.0)[:, None])
    z = torch.tensor([0.0, 0.0, 1.0, 2.0]).view(2, 2, 1)
    terms = vq(z, want_terms=True)[3]
    p = torch.tensor([0.5, 0.25, 0.25])
    assert terms.perplexity.item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)
    assert terms.codes_used == 3


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen", "update=False"])
def test_a_frozen_quantizer_does_not_change(how):
    vq = VectorQuantizer(K, D, BETA, warmup_steps=1, revive_every=1).train()
    if how == "eval":
        vq.eval()
    if how == "frozen":
        vq.requires_grad_(False)
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    with torch.set_grad_enabled(how != "no_grad"):
        for _ in range(4):
            vq(torch.randn(4, 2, D), update=how != "update=False")
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())


def test_no_random_numbers_are_drawn():
    vq = VectorQuantizer(K, D, BETA, warmup_steps=1, revive_every=2).train()
    z = torch.randn(4, 2, D)
    state = torch.get_rng_state()
    for _ in range(5):
        vq(z)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_forwards_before_one_backward():
    vq = VectorQuantizer(K, D, BETA, warmup_steps=1, revive_every=1).train()
    vq(torch.randn(4, 2, D))
    losses = [vq(torch.randn(4, 2, D, requires_grad=True))[2] for _ in range(2)]
    sum(losses).backward()
    assert vq.weight.grad.any()


def test_compiled_fullgraph_equals_eager():
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(3)
        vq = VectorQuantizer(K, D, BETA, warmup_steps=2, revive_every=3).train()
        call = torch.compile(vq, backend="aot_eager", fullgraph=True) if compiled else vq
        outputs = [call(torch.randn(4, 3, D))[0] for _ in range(7)]
        runs.append((outputs, vq.state_dict()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(runs[0][0], runs[1][0]))
    assert all(torch.allclose(v.float(), runs[1][1][k].float(), atol=1e-6) for k, v in runs[0][1].items())
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [{"codebook_size": 0}, {"dim": 0}, {"warmup_steps": -1}, {"usage_decay": 1.0}])
def test_settings_are_checked(change):
    with pytest.raises(LaraArgumentError, match="outside their ranges"):
        VectorQuantizer(**{"codebook_size": K, "dim": D, **change})
