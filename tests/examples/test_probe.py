from __future__ import annotations

import pytest
import torch

from examples.demo.probe import r2_interval, ridge_probe
from lara_adapter.evaluation import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # worked out with the roots of (p - rate)^2 = z^2 p (1 - p) / n, the definition of the interval
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval(successes, trials, low, high):
    got = wilson_interval(successes, trials)
    assert got == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_solves_its_defining_equation():
    for successes, trials in ((3, 17), (40, 41), (72, 100)):
        rate = successes / trials
        for end in wilson_interval(successes, trials):
            assert (rate - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / trials, rel=1e-9)


def latents(seed: int, episodes: int, noise: float, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(episodes * 20, 12, generator=random)
    y = x @ weight + 0.5 + noise * torch.randn(len(x), weight.shape[1], generator=random)
    return x, y, torch.arange(episodes).repeat_interleave(20)


WEIGHT = torch.randn(12, 3, generator=torch.Generator().manual_seed(9)) / 12**0.5


def test_probe_finds_what_is_linear_and_nothing_in_noise():
    train = latents(0, 20, 0.0, WEIGHT)
    x, y, group = latents(1, 20, 0.0, WEIGHT)
    assert ridge_probe(train, (x, y, group)).r2 == pytest.approx(1, abs=1e-4)
    unrelated = ridge_probe(train, (torch.randn(x.shape), y, group))
    assert unrelated.r2 < 0
    half = ridge_probe(latents(2, 20, 1.0, WEIGHT), latents(3, 20, 1.0, WEIGHT))
    signal = float((WEIGHT.square().sum(0) / (WEIGHT.square().sum(0) + 1)).mean())
    assert half.r2 == pytest.approx(signal, abs=0.08)


def test_probe_is_the_same_as_least_squares_written_out():
    (x, y, group), test = latents(4, 10, 0.3, WEIGHT), latents(5, 10, 0.3, WEIGHT)
    probe = ridge_probe((x, y, group), test)
    mean, scale = x.double().mean(0), x.double().std(0)
    a = torch.cat([(x - mean) / scale, torch.ones(len(x), 1)], 1).double()
    penalty = probe.penalty * torch.eye(13).double()
    penalty[-1, -1] = 0  # the constant is not penalised
    solution = torch.linalg.solve(a.T @ a + penalty, a.T @ y.double())
    b = torch.cat([(test[0] - mean) / scale, torch.ones(len(test[0]), 1)], 1).double()
    error = (b @ solution - test[1]).square().sum()
    variance = (test[1].double() - test[1].double().mean(0)).square().sum()
    assert probe.r2 == pytest.approx(float(1 - error / variance), abs=1e-6)


def test_probe_sums_over_demonstrations():
    probe = ridge_probe(latents(0, 6, 0.5, WEIGHT), latents(1, 4, 0.5, WEIGHT))
    assert len(probe.errors) == len(probe.variances) == 4
    assert probe.r2 == pytest.approx(float(1 - probe.errors.sum() / probe.variances.sum()))


def test_probe_survives_a_constant_latent():
    (x, y, group), (test_x, test_y, test_group) = latents(0, 6, 0.5, WEIGHT), latents(1, 4, 0.5, WEIGHT)
    probe = ridge_probe((torch.ones_like(x), y, group), (torch.ones_like(test_x), test_y, test_group))
    assert probe.r2 == pytest.approx(0, abs=0.05)


def test_intervals_hold_the_value_and_tell_apart_what_differs():
    train, test = latents(0, 20, 0.5, WEIGHT), latents(1, 20, 0.5, WEIGHT)
    good = ridge_probe(train, test)
    bad = ridge_probe(train, (test[0] + torch.randn(test[0].shape), *test[1:]))
    low, high = r2_interval(good)
    assert low < good.r2 < high
    low, high = r2_interval(good, bad)
    assert 0 < low < good.r2 - bad.r2 < high
    low, high = r2_interval(good, good)
    assert low == high == 0
