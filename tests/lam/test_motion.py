"""The measure of motion on data whose truth is known, and its ceiling."""

from __future__ import annotations

import math

import pytest
import torch

from lara_adapter import LaraArgumentError
from lara_adapter.lam.health.actions import ActionHealth, judge_actions
from lara_adapter.lam.health.ceiling import train_ceiling
from lara_adapter.lam.health.kernel import fit_kernels
from lara_adapter.lam.health.motion import measure_motion
from lara_adapter.lam.health.verdicts import Thresholds

ROWS, EPISODES, WIDTH = 600, 15, 12


@pytest.fixture(scope="module")
def world():
    """Positions and displacements [R, 3], independent of each other, and the episode of each row."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, generator=g), torch.randn(ROWS, 3, generator=g), torch.arange(ROWS) // 40


def encoded(values: torch.Tensor, seed: int, noise: float = 0.01) -> torch.Tensor:
    """[R, 12]: a random linear map of the values, with a little noise."""
    g = torch.Generator().manual_seed(seed)
    code = values @ torch.randn(values.shape[1], WIDTH, generator=g)
    return code + noise * torch.randn(len(values), WIDTH, generator=g)


def test_position_alone_says_nothing_about_motion(world):
    position, displacement, episode = world
    z = encoded(position, 1)
    found = measure_motion(z, encoded(position, 1), displacement, episode, known=position)
    assert found.beyond.value == pytest.approx(0, abs=0.01)
    assert found.pair.value == pytest.approx(0, abs=0.02)
    assert (found.rows, found.episodes, found.folds) == (ROWS, EPISODES, 5)


def test_displacement_says_everything(world):
    position, displacement, episode = world
    found = measure_motion(encoded(displacement, 2), encoded(0 * displacement, 3), displacement, episode)
    assert found.beyond.value > 0.999
    assert found.still.value == pytest.approx(0, abs=0.02)
    assert found.known is None
    # where the hand will be, which only together with where it is now gives the motion
    later = measure_motion(encoded(position + displacement, 2), encoded(position, 2), displacement, episode)
    assert later.pair.value == pytest.approx(0.5, abs=0.07)
    assert later.beyond.value > 0.99


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_mixture_lies_between(world, share):
    """Noise of a known size beside the displacement leaves exactly that share of it readable."""
    position, displacement, episode = world
    noise = torch.randn(displacement.shape, generator=torch.Generator().manual_seed(5)) * (1 / share - 1) ** 0.5
    z = encoded(torch.cat([position, displacement + noise], 1), 2, 0.0)
    found = measure_motion(z, encoded(position, 4), displacement, episode, known=position)
    assert found.beyond.value == pytest.approx(share, abs=0.06)
    assert found.beyond.low < found.beyond.value < found.beyond.high
    assert found.beyond.high - found.beyond.low < 0.2


def test_a_still_pair_cannot_pass_where_an_expert_acts(world):
    """Actions that follow from the position: the plain R^2 is near 1, what z adds is 0."""
    position, displacement, episode = world
    action = position @ torch.randn(3, 2, generator=torch.Generator().manual_seed(7)) + 0.1 * displacement[:, :2]
    z = encoded(position, 1)
    found = measure_motion(z, z, action, episode, known=position)
    assert found.pair.value > 0.95
    assert found.still.value == pytest.approx(found.pair.value)
    assert found.present.value > 0.95
    assert found.beyond.value == pytest.approx(0, abs=0.02)
    (_, verdict) = judge_actions(ActionHealth({}, "", {"action": found}, ""), Thresholds())
    assert verdict.state == "note"
    assert "measure on play" in verdict.text


def test_products_of_the_state_count_as_seen(world):
    position, displacement, episode = world
    product = position[:, :1] * position[:, 1:2]
    target, z = product + 0.3 * displacement[:, :1], encoded(product, 1)
    assert measure_motion(z, 0 * z, target, episode).beyond.value > 0.85
    found = measure_motion(z, 0 * z, target, episode, known=position)
    assert found.beyond.value == pytest.approx(0, abs=0.03)
    assert found.known.value > 0.85


def test_the_share_of_a_ceiling_and_its_verdict(world):
    position, displacement, episode = world
    g = torch.Generator().manual_seed(8)
    seen = displacement + 0.5 * torch.randn(displacement.shape, generator=g)  # 0.8 of it can be seen
    weak = displacement + 3 * torch.randn(displacement.shape, generator=g)  # 0.1
    still = encoded(position, 1)
    good, bad, none = (
        measure_motion(z, still, displacement, episode, known=position, supervised=ceiling)
        for z, ceiling in ((encoded(seen, 1), seen), (encoded(weak, 1), seen), (encoded(weak, 1), position))
    )
    assert good.ceiling.value == pytest.approx(0.8, abs=0.04)
    assert good.share_beyond.value == pytest.approx(1, abs=0.03)
    assert bad.share_beyond.value == pytest.approx(0.1 / 0.8, abs=0.05)
    assert none.share_beyond is None  # nothing can be seen: no share
    verdicts = judge_actions(ActionHealth({}, "", {"a": good, "b": bad, "c": none}, ""), Thresholds())[1:]
    assert [verdict.state for verdict in verdicts] == ["ok", "fail", "ok"]
    assert "does not hold it" in verdicts[1].text


def test_rows_that_are_not_finite_are_left_out(world):
    position, displacement, episode = world
    z, target = encoded(displacement, 2), displacement.clone()
    z[3, 0], target[50, 1], target[51, 0] = math.nan, math.inf, math.nan
    found = measure_motion(z, 0 * z.nan_to_num(), target, episode, known=position)
    assert found.rows == ROWS - 3
    assert found.beyond.value > 0.99


def test_the_interval_covers_the_truth_about_as_often_as_it_says(world):
    """40 worlds in which z explains half of the motion."""
    inside = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(100 + seed)
        displacement, noise = torch.randn(300, 1, generator=g), torch.randn(300, 1, generator=g)
        z = displacement + noise
        found = measure_motion(z, 0 * z, displacement, torch.arange(300) // 15)
        inside += found.beyond.low <= 0.5 <= found.beyond.high
    assert inside >= 33


def test_refusals(world):
    position, displacement, episode = world
    with pytest.raises(LaraArgumentError, match="at least 3 episodes, but there are 2"):
        measure_motion(position[:80], position[:80], displacement[:80], episode[:80])
    with pytest.raises(LaraArgumentError, match="never changes"):
        measure_motion(position, position, torch.ones(ROWS, 2), episode)
    with pytest.raises(LaraArgumentError, match=r"still has shape \(599, 3\), but \[600, numbers\] is expected"):
        measure_motion(position, position[1:], displacement, episode)
    with pytest.raises(LaraArgumentError, match="at least 3 episodes are needed, but there are 2"):
        fit_kernels(torch.zeros(9, 3, 8, 8), torch.zeros(9, 3, 8, 8), torch.zeros(9, 1), torch.arange(9) // 5)
    with pytest.raises(LaraArgumentError, match="the labels never change"):
        fit_kernels(torch.zeros(9, 3, 8, 8), torch.zeros(9, 3, 8, 8), torch.zeros(9, 1), torch.arange(9) // 3)
    with pytest.raises(LaraArgumentError, match="at least 4 episodes"):
        train_ceiling(torch.zeros(9, 3, 8, 8), torch.zeros(9, 3, 8, 8), torch.zeros(9, 1), torch.arange(9) // 3)


@pytest.mark.slow
def test_the_ceiling_sees_motion_and_nothing_where_nothing_moves():
    """A square that moves: its displacement is read from the pair, and not from two equal frames."""
    g = torch.Generator().manual_seed(0)
    rows, side = 600, 16
    place, step = torch.randint(4, 10, (rows, 2), generator=g), torch.randint(-3, 4, (rows, 2), generator=g)
    line = torch.arange(side)

    def frames(at: torch.Tensor) -> torch.Tensor:
        inside = [(line >= at[:, axis, None]) & (line < at[:, axis, None] + 3) for axis in (0, 1)]
        square = inside[0][:, :, None] & inside[1][:, None, :]
        return (200 * square)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)

    episode, labels = torch.arange(rows) // 60, step.float()
    before = torch.random.get_rng_state()
    options = {"folds": 2, "widths": (8, 16), "epochs": 12, "batch_size": 32}
    seen = train_ceiling(frames(place), frames(place + step), labels, episode, **options)
    blind = train_ceiling(frames(place), frames(place), labels, episode, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen.chosen in seen.tried
    assert len(seen.tried) >= 3  # two rates, and a second size
    assert seen.chosen.r2 >= max(each.r2 for each in seen.tried) - 0.01

    def ceiling(prediction: torch.Tensor) -> float:
        z = torch.zeros(rows, 1)
        return measure_motion(z, z, labels, episode, supervised=prediction).ceiling.value

    assert ceiling(seen.prediction) > 0.8
    assert ceiling(blind.prediction) < 0.05
    for states in (None, place.float()):
        options = {"folds": 2, "states": states}
        assert ceiling(fit_kernels(frames(place), frames(place + step), labels, episode, **options)) > 0.8
        assert ceiling(fit_kernels(frames(place), frames(place), labels, episode, **options)) < 0.05
