"""LPIPS under the host's autocast: the trunk in bfloat16, all else in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lara_adapter.lam.perceptual import PerceptualDistance


class Trunk(nn.Module):
    """In place of VGG16: two layers that are compared."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.seen = []

    def forward(self, images):
        first = self.first(images).relu()
        second = self.second(first).relu()
        self.seen.append(second.dtype)
        return first, second


class Lpips(nn.Module):
    """The package's own layout: `net` is called by its forward, past hooks; then normalised differences, weighted."""

    def __init__(self):
        super().__init__()
        self.net, self.lin = Trunk(), nn.Conv2d(16, 1, 1, bias=False)
        self.given = []

    def forward(self, first, second, normalize):
        assert normalize
        layers = [self.net.forward(2 * images - 1) for images in (first, second)]
        self.given += [layer.dtype for layer in layers[0]]
        a, b = ([nn.functional.normalize(layer) for layer in own] for own in layers)
        return sum(self.lin((x - y) ** 2).abs().mean((1, 2, 3), keepdim=True) for x, y in zip(a, b))


@pytest.fixture
def distance():
    torch.manual_seed(0)
    distance = PerceptualDistance()
    distance.hold(Lpips())
    distance.tried = True
    return distance


def measure(distance, dtype):
    """The distances and the gradient of their mean."""
    random = torch.Generator().manual_seed(1)
    predicted, target = torch.rand(2, 4, 3, 24, 24, generator=random)
    predicted.requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = distance(predicted, target)
    found.mean().backward()
    return found.detach(), predicted.grad


def test_bfloat16_in_the_trunk_alone(distance):
    exact, gradient = measure(distance, None)
    lpips = distance.network
    assert lpips.net.seen == [torch.float32] * 2
    found, narrow = measure(distance, torch.bfloat16)
    assert lpips.net.seen[2:] == [torch.bfloat16] * 2
    assert lpips.given == [torch.float32] * 4
    assert found.dtype == narrow.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0)
    # rectified units switch where they are near zero, so the gradient is less exact than the distance
    assert torch.cosine_similarity(narrow.flatten(), gradient.flatten(), dim=0) > 0.99


def test_float16_is_no_precision_for_it(distance):
    """Activations of VGG16 do not fit into its range."""
    for found, expected in zip(measure(distance, torch.float16), measure(distance, None)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_computed_again_in_the_backward_it_gives_the_same_bits(distance, dtype):
    expected = measure(distance, dtype)
    distance.checkpointing = True
    for found, value in zip(measure(distance, dtype), expected):
        assert torch.equal(found, value)


def test_both_ways_share_their_weights_also_in_a_copy(distance):
    copied = copy.deepcopy(distance)
    assert copied.network is not distance.network
    with torch.no_grad():
        copied.network.net.first.weight.zero_()
        copied.network.net.first.bias.zero_()
    assert measure(copied, torch.bfloat16)[0].eq(0).all()
    assert measure(distance, torch.bfloat16)[0].ne(0).all()
    assert not list(distance.parameters())
    assert not distance.state_dict()


def test_a_network_without_a_trunk_stays_in_float32(distance):
    distance.hold(nn.Sequential())
    distance.network.forward = lambda a, b, normalize: (a - b).square().mean((1, 2, 3), keepdim=True)
    assert torch.equal(measure(distance, torch.bfloat16)[0], measure(distance, None)[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_in_one_graph(distance, dtype):
    torch._dynamo.reset()
    expected = measure(distance, dtype)
    for found, value in zip(measure(torch.compile(distance, backend="aot_eager", fullgraph=True), dtype), expected):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
