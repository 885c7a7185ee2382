import math

import pytest
import torch

from lara_adapter import AdapterFormatError, Contrastive, LaraArgumentError
from lara_adapter.losses import CosineDistance, masked_mean, resolve_alignment, scale_gradient

P = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Z = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_cosine_and_its_gradient_by_hand():
    p, z = P.clone().requires_grad_(), Z.clone().requires_grad_()
    loss = CosineDistance()(p, z)
    for i in range(5):
        a, b = P[i].tolist(), Z[i].tolist()
        dot, na, nb = sum(x * y for x, y in zip(a, b)), math.hypot(*a), math.hypot(*b)
        assert math.isclose(loss[i].item(), 1 - dot / (na * nb), rel_tol=1e-12)
    loss.sum().backward()
    norm_p, norm_z = P.norm(dim=1, keepdim=True), Z.norm(dim=1, keepdim=True)
    cos = (P * Z).sum(1, keepdim=True) / (norm_p * norm_z)
    assert torch.allclose(p.grad, -(Z / (norm_p * norm_z) - cos * P / norm_p**2), atol=1e-12)
    assert torch.allclose(z.grad, -(P / (norm_p * norm_z) - cos * Z / norm_z**2), atol=1e-12)


def _info_nce(rows, temperature, scale):
    """InfoNCE by loops over the samples `rows`, both directions, negatives from `rows` only."""
    unit = lambda v: v / v.norm()  # noqa: E731
    sim = [[float(unit(P[i]) @ unit(Z[j])) / temperature for j in range(5)] for i in range(5)]
    out = {}
    for i in rows:
        forward = -sim[i][i] + math.log(sum(math.exp(sim[i][j]) for j in rows))
        backward = -sim[i][i] + math.log(sum(math.exp(sim[j][i]) for j in rows))
        out[i] = scale * (forward + backward) / 2
    return out


@pytest.mark.parametrize(("temperature", "scale"), [(0.1, 0.2), (0.5, 1.0)])
def test_contrastive_by_loops(temperature, scale):
    loss = Contrastive(temperature, scale)(P, Z)
    expected = _info_nce(range(5), temperature, scale)
    for i in range(5):
        assert math.isclose(loss[i].item(), expected[i], rel_tol=1e-10)


def test_invalid_samples_are_no_negatives():
    valid = torch.tensor([True, False, True, True, False])
    loss = Contrastive()(P, Z, valid)
    expected = _info_nce([0, 2, 3], 0.1, 0.2)
    for i, value in expected.items():
        assert math.isclose(loss[i].item(), value, rel_tol=1e-10)


def test_contrastive_cannot_be_satisfied_by_a_constant_and_cosine_can():
    constant = torch.ones(32, 7)
    assert CosineDistance()(constant, constant).max() < 1e-6
    assert math.isclose(Contrastive()(constant, constant).mean().item(), 0.2 * math.log(32), rel_tol=1e-5)


@pytest.mark.parametrize("alignment", [CosineDistance(), Contrastive()])
def test_a_latent_of_no_length_has_no_direction_and_a_bounded_gradient(alignment):
    """As of a pair in which nothing moves, with `subtract_still`."""
    z = Z.clone()
    z[2] = 0
    z[3] *= 1e-9
    p, z = P.clone().requires_grad_(), z.requires_grad_()
    loss = alignment(p, z)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert z.grad.norm(dim=1).max() < 1000
    assert p.grad.isfinite().all()
    if isinstance(alignment, CosineDistance):
        torch.testing.assert_close(loss[2:4], torch.ones_like(loss[2:4]), rtol=0, atol=1e-6)
        assert not p.grad[2].any()


def test_contrastive_of_a_batch_of_one_or_of_no_valid_pair_is_finite():
    assert Contrastive()(P[:1], Z[:1]).item() == pytest.approx(0, abs=1e-12)
    none = torch.zeros(5, dtype=torch.bool)
    p = P.clone().requires_grad_()
    loss = masked_mean(Contrastive()(p, Z, none), none)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(p.grad, torch.zeros_like(p))


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 2.0])
def test_scale_gradient_keeps_the_values_bit_for_bit(factor):
    x = torch.randn(1000).requires_grad_()
    y = scale_gradient(x, factor)
    assert torch.equal(x.detach(), y.detach())
    if factor:
        y.backward(torch.ones(1000))
        assert torch.equal(x.grad, torch.full((1000,), factor))
    else:
        assert not y.requires_grad


def test_masked_mean():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert masked_mean(values, torch.tensor([True, False, True])) == 2
    assert masked_mean(values, torch.tensor([False] * 3)) == 0


def test_names_settings_and_json():
    assert resolve_alignment("cosine")[1] == {"name": "cosine"}
    alignment, settings = resolve_alignment(Contrastive(temperature=0.5))
    assert settings == {"name": "contrastive", "temperature": 0.5, "scale": 0.2}
    assert resolve_alignment(settings)[0] == alignment
    assert resolve_alignment(lambda p, z: p[:, 0])[1] is None


def test_user_callable_with_and_without_flags():
    plain, _ = resolve_alignment(lambda p, z: (p - z).square().mean(1))
    assert torch.allclose(plain(P, Z, torch.ones(5, dtype=torch.bool)), (P - Z).square().mean(1))
    seen = []
    flagged, _ = resolve_alignment(lambda p, z, valid: seen.append(valid) or p[:, 0])
    flagged(P, Z, torch.zeros(5, dtype=torch.bool))
    assert seen[0].tolist() == [False] * 5
    wrong, _ = resolve_alignment(lambda p, z: (p - z).mean())
    with pytest.raises(LaraArgumentError, match=r"returned \[\], but one loss per sample \[5\]"):
        wrong(P, Z)


@pytest.mark.parametrize("alignment", ["l2", 3])
def test_unknown_alignment(alignment):
    with pytest.raises(LaraArgumentError, match=r"contrastive|callable"):
        resolve_alignment(alignment)


@pytest.mark.parametrize("settings", [{"name": "l2"}, {"name": "contrastive", "_target_": "os.system"}, {}])
def test_foreign_settings(settings):
    with pytest.raises(AdapterFormatError, match="is not an alignment"):
        resolve_alignment(settings)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "a", True])
def test_contrastive_settings_are_checked(value):
    with pytest.raises(LaraArgumentError, match="temperature="):
        Contrastive(temperature=value)
