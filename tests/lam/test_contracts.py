"""What others rely on: equal codebooks on all ranks, a compilable model, the release's M-Former, LPIPS at will."""

from __future__ import annotations

import copy
import os
import sys
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from test_model import frames, moving_squares, small
from torch import nn

from lara_adapter.lam import VectorQuantizer

K, D = 12, 4


def _train_on_one_rank(rank: int) -> list[dict]:
    torch.manual_seed(0)
    with mock.patch.object(dist, "is_initialized", return_value=False):  # a policy is usually built before the group
        vq = VectorQuantizer(K, D, warmup_steps=3, revive_every=4, usage_decay=0.2).train()
    model = nn.parallel.DistributedDataParallel(vq)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + rank)
    history = []
    for step in range(14):
        # few clusters leave codes dead; rank 1 has no valid sample when the warm-up ends, and at a revival
        z = torch.randint(0, 3, (6, 2, 1)).float().expand(-1, -1, D) + 0.01 * torch.randn(6, 2, D) + 10 * rank
        valid = torch.full((6,), not (rank == 1 and step in (2, 7)))
        z.requires_grad_()
        quantized, _, loss = model(z, valid)
        optimizer.zero_grad()
        (loss + 0 * quantized.sum()).backward()
        optimizer.step()
        history.append({name: value.clone() for name, value in vq.state_dict().items()})
    return history


def test_two_ranks_write_the_same_bytes():
    first, second = run_ranks(_train_on_one_rank)
    for step, (a, b) in enumerate(zip(first, second)):
        assert all(torch.equal(a[name], b[name]) for name in a), step
    assert [int(state["ready"]) for state in first[:4]] == [0, 0, 1, 1]
    offsets = [state["offset"] for state in first]
    # the start was taken from rank 0 alone, the only one with data; later revivals take from rank 1 too
    assert (offsets[2] + first[1]["weight"]).max() < 5
    assert (offsets[-1] + first[-1]["weight"]).max() > 5
    revived = [step for step in range(3, 14) if not torch.equal(offsets[step], offsets[step - 1])]
    assert revived
    assert all((step + 1) % 4 == 0 for step in revived)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"difference_input": True, "fusion": "concat", "normalize_latent": True, "subtract_still": True},
    ],
)
def test_the_whole_model_compiles_in_one_graph(changes):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(5)
        lam = small(vq_warmup_steps=2, vq_revive_every=2, **changes).train()
        call = torch.compile(lam, backend="aot_eager", fullgraph=True) if compiled else lam
        losses = []
        for step in range(4):
            lam.zero_grad()
            loss = call(*frames(seed=step), torch.tensor([True, True, False, True])).loss
            loss.backward()
            losses.append(loss.detach())
        runs.append((losses, [p.grad for p in lam.parameters()], lam.state_dict()))
    (losses, grads, state), (compiled_losses, compiled_grads, compiled_state) = runs
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(losses, compiled_losses))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, compiled_grads))
    assert all(torch.allclose(v.float(), compiled_state[k].float(), atol=1e-5) for k, v in state.items())
    torch._dynamo.reset()


def test_the_m_former_equals_the_releases_layers():
    """transformers' ViT encoder, which the release builds on, with the same weights over the whole sequence."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.vit.modeling_vit import ViTLayer

    lam = small(legacy_token_types=True, idm_layers=3)
    # float64: in float32 the tanh approximation of GELU would pass for the exact one
    idm = lam.inverse_dynamics.double()
    for parameter in idm.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = transformers.ViTConfig(
        hidden_size=24, num_attention_heads=2, intermediate_size=48, layer_norm_eps=1e-12, hidden_dropout_prob=0.0
    )
    config._attn_implementation = "eager"
    present, future = torch.randn(2, 2, 16, 24, dtype=torch.float64).unbind()
    sequence = torch.cat(
        [
            idm.queries.expand(2, -1, -1), idm.projection(present),
            idm.separator.expand(2, -1, -1), idm.projection(future),
        ],
        1,
    )  # fmt: skip
    sequence = sequence + idm.positions + idm.token_types[0]
    for ours in idm.layers:
        theirs = ViTLayer(config).double().eval()
        key, value = ours.key_value.weight.chunk(2)
        key_bias, value_bias = ours.key_value.bias.chunk(2)
        matrices = {
            ("q_proj", "query"): (ours.query.weight, ours.query.bias),
            ("k_proj", "key"): (key, key_bias),
            ("v_proj", "value"): (value, value_bias),
            ("o_proj", "output.dense"): (ours.attention_output.weight, ours.attention_output.bias),
            ("mlp.fc1", "intermediate.dense"): (ours.mlp[0].weight, ours.mlp[0].bias),
            ("mlp.fc2", "output.dense"): (ours.mlp[2].weight, ours.mlp[2].bias),
            ("layernorm_before",): (ours.attention_norm.weight, ours.attention_norm.bias),
            ("layernorm_after",): (ours.mlp_norm.weight, ours.mlp_norm.bias),
        }
        named = dict(theirs.named_modules())
        filled = set()
        for endings, (weight, bias) in matrices.items():
            # transformers 5 and 4 name them differently; the attention's output and the MLP's share an ending in 4
            mlp = any(ending.startswith(("mlp", "intermediate")) for ending in endings)
            found = [
                module for name, module in named.items()
                if name.endswith(endings) and not (name.endswith("output.dense") and name.startswith("attention") == mlp)
            ]  # fmt: skip
            assert len(found) == 1, endings
            filled.add(found[0])
            with torch.no_grad():
                found[0].weight.copy_(weight)
                found[0].bias.copy_(bias)
        assert filled == {module for module in named.values() if isinstance(module, nn.Linear | nn.LayerNorm)}
        sequence = theirs(sequence)
        sequence = sequence[0] if isinstance(sequence, tuple) else sequence
    expected = idm.down(idm.norm(sequence)[:, :3]).float()
    assert torch.allclose(idm(present, future)[0], expected, rtol=1e-6, atol=1e-6)
    # the explicit softmax computes in float32
    assert torch.allclose(idm(present, future, want_attention=True)[0], expected, atol=1e-4)


class FakeLpips(nn.Module):
    """Stands for the package: a distance with a weight, so that leaks into the tree would show."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "vgg"
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, a, b, normalize):
        assert normalize
        return self.scale * (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_counts_with_its_weight_and_stays_outside_the_tree(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLpips))
    lam = small(perceptual_weight=0.5).train()
    plain = small().train()
    plain.load_state_dict(lam.state_dict())
    assert lam.perceptual.network is None, "LPIPS is loaded before anything asks for it"
    present, future = frames()
    out, without = lam(present, future), plain(present, future)
    by_hand = 3 * (out.reconstruction - future.float() / 255).abs().mean()
    assert torch.allclose(out.perceptual_loss, by_hand)
    assert torch.allclose(out.loss, without.loss + 0.5 * by_hand)
    out.loss.backward()
    network = lam.perceptual.network
    assert network.scale.grad is None
    assert not network.training
    assert not any("perceptual" in name for name in [*lam.state_dict(), *dict(lam.named_parameters())])
    valid = torch.tensor([True, False, True, False])
    subset = copy.deepcopy(lam)(present[valid], future[valid])
    assert torch.allclose(lam(present, future, valid).perceptual_loss, subset.perceptual_loss, atol=1e-6)


def test_without_lpips_one_warning_and_the_same_loss(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lpips", None)
    lam = small(perceptual_weight=1.0).eval()
    plain = small().eval()
    plain.load_state_dict(lam.state_dict())
    out = lam(*frames())
    lam(*frames())
    assert out.perceptual_loss == 0
    assert torch.equal(out.loss, plain(*frames()).loss)
    assert caplog.text.count("perceptual loss is OFF") == 1


@pytest.mark.long
def test_tiny_predicts_through_its_latent(trained_tiny):
    """The ratio alone proves little: a blur that ignores z beats the copy too (0.60). Another pair's z must do worse."""
    lam = trained_tiny
    present, future = moving_squares(128, 10_000)
    health = lam.health([(present, future)])
    with torch.no_grad():
        codes = lam.encode(present, future).quantized
        target = future.float() / 255
        copied = (present.float() / 255 - target).square().mean()
        own, other = ((lam.predict(present, z) - target).square().mean() / copied for z in (codes, codes.roll(1, 0)))
    assert own < 0.55
    assert other > own + 0.1
    assert health.codes_used > 20
    assert health.mean_direction < 0.97


def test_a_frozen_model_in_train_mode_does_not_change():
    lam = small(vq_warmup_steps=1, vq_revive_every=1).requires_grad_(False).train()
    before = {name: value.clone() for name, value in lam.state_dict().items()}
    for seed in range(3):
        lam(*frames(seed=seed))
    assert all(torch.equal(before[name], value) for name, value in lam.state_dict().items())


def test_a_nan_in_an_invalid_pair_reaches_no_weight():
    lam = small(reconstruction_over_copy=True, vq_warmup_steps=1).train()
    present, future = (f.float() / 255 for f in frames())
    future[1] = float("nan")
    present[3] = float("inf")
    for _ in range(2):
        out = lam(present, future, torch.tensor([True, False, True, False]))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in lam.parameters())
    assert all(torch.isfinite(value).all() for value in lam.state_dict().values() if value.is_floating_point())


def test_the_package_imports_nothing_optional():
    import subprocess

    code = (
        "import sys, lara_adapter.lam; "
        "print(sorted({'transformers', 'lpips', 'vector_quantize_pytorch', 'einops'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ), timeout=120
    )
    assert done.stdout.strip() == "[]"
