"""What saves memory changes no gradient: layers computed again in the backward, an encoder held in 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import build
from helpers.toys import make_batch
from test_model import frames, small

from lara_adapter import LaraArgumentError, LatentActionConfig, LatentActionModel


class Distance(torch.nn.Module):
    """In place of LPIPS."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))

    def forward(self, predicted, target, normalize):
        return (self.layers(predicted) - self.layers(target)).square().mean((1, 2, 3), keepdim=True)


def kept_bytes(work):
    """Bytes that the forward keeps for the backward, once for each storage."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = work()
    return sum(kept.values()), loss


def train(lam, **part):
    """Bytes kept, gradients and state after three steps."""
    kept = []
    for number in range(3):
        lam.zero_grad()
        size, loss = kept_bytes(lambda: lam(*frames(seed=number), **part).loss)  # noqa: B023
        loss.backward()
        kept.append(size)
    return kept[-1], {n: p.grad for n, p in lam.named_parameters()}, lam.state_dict()


def with_distance(lam):
    from lara_adapter.lam.perceptual import PerceptualDistance

    torch.manual_seed(3)
    lam.perceptual = PerceptualDistance()
    lam.perceptual.hold(Distance())
    lam.perceptual.tried = True
    lam.config = LatentActionConfig(**{**lam.config.__dict__, "perceptual_weight": 0.5})
    return lam


@pytest.mark.parametrize("part", [{}, {"reconstruct": 0.5, "draw": 3}])
def test_layers_computed_again_give_the_same_bits_and_the_quantiser_counts_once(part):
    torch.manual_seed(0)
    plain = with_distance(small(vq_warmup_steps=1, vq_revive_every=1)).train()
    again = copy.deepcopy(plain)
    again.checkpoint_layers()
    (kept, expected, state), (less, found, other) = train(plain, **part), train(again, **part)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(torch.equal(other[name], value) for name, value in state.items())
    assert other["quantizer.step"] == 3
    assert less < 0.6 * kept
    again.checkpoint_layers(False)
    assert train(again, **part)[0] == kept


@pytest.mark.long
def test_with_a_policy_compiled_or_not():
    torch._dynamo.reset()
    gradients = []
    for checkpointing, compiled in ((False, False), (True, False), (True, True)):
        policy, lara = build(lam="tiny")
        lara.lam.checkpoint_layers(checkpointing)
        (torch.compile(policy, backend="aot_eager") if compiled else policy)(make_batch())["loss"].backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
        assert lara.lam.quantizer.step == 1
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()


@pytest.fixture
def frozen(tmp_path):
    pytest.importorskip("transformers")
    from test_encoders import REST, mae

    from lara_adapter.lam.image_encoder import describe_image_encoder

    torch.manual_seed(0)
    mae(tmp_path / "mae")
    return LatentActionModel(LatentActionConfig(**describe_image_encoder(str(tmp_path / "mae")), **REST)).eval()


def test_an_encoder_in_16_bits_is_half_as_large_and_the_same_under_autocast(frozen):
    def weigh():
        return sum(p.numel() * p.element_size() for p in frozen.image_encoder.network.parameters())

    def encode():
        with torch.autocast("cpu", torch.bfloat16):
            return frozen.encode(*frames(size=32)).continuous

    exact, before, size = frozen.encode(*frames(size=32)).continuous, encode(), weigh()
    frozen.narrow_encoder()
    assert torch.equal(encode(), before)
    assert weigh() < 0.6 * size
    torch.testing.assert_close(frozen.encode(*frames(size=32)).continuous, exact, rtol=0.1, atol=0.02)
    assert "image_encoder" not in "".join(frozen.state_dict())


def test_what_cannot_be_narrowed_is_refused(frozen):
    with pytest.raises(LaraArgumentError, match=r"bfloat16 or torch\.float16 is expected"):
        frozen.narrow_encoder(torch.float32)
    with pytest.raises(LaraArgumentError, match="no frozen image encoder"):
        small().narrow_encoder()
