"""The latent action model as a whole."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lara_adapter import FrameError, LaraArgumentError, LatentAction, LatentActionConfig, LatentActionModel

SMALL = dict(
    image_size=32, image_encoder=None, encoder_patch_size=8, encoder_prefix_tokens=0, encoder_width=24, encoder_layers=1,
    queries=3, latent_dim=4, idm_width=24, idm_layers=2, idm_heads=2, idm_mlp=48, fdm_width=24, fdm_layers=2, fdm_heads=2,
    fdm_mlp=48, fdm_patch_size=8, codebook_size=16, perceptual_weight=0.0,
)  # fmt: skip


def small(**changes):
    return LatentActionModel(LatentActionConfig(**{**SMALL, **changes}))


def save_distinct(folder):
    """A model of `small` whose latent actions and codes differ from pair to pair, saved in a folder."""
    torch.manual_seed(0)
    model = small(initializer_range=0.3, vq_init_from_data=True, image_size=24)
    with torch.no_grad():
        model.train()(*(torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8) for _ in range(2)))
    model.save_pretrained(folder)
    return folder


def frames(batch=4, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (batch, 3, size, size), generator=g, dtype=torch.uint8) for _ in range(2))


def test_shapes_and_loss_by_hand():
    lam = small().eval()
    present, future = frames()
    out = lam(present, future)
    assert (lam.latent_shape, lam.latent_width) == ((3, 4), 12)
    assert out.latent.continuous.shape == out.latent.quantized.shape == (4, 3, 4)
    assert out.latent.indices.shape == (4, 3)
    x, y = present.float() / 255, future.float() / 255
    assert torch.allclose(out.reconstruction_loss, F.mse_loss(out.reconstruction, y))
    assert torch.allclose(out.copy_loss, F.mse_loss(x, y))
    z, codes = out.latent.continuous, lam.quantizer.indices_to_codes(out.latent.indices)
    vq = (z - codes).square().mean()
    assert torch.allclose(out.codebook_loss, vq)
    assert torch.allclose(out.loss, out.reconstruction_loss + vq + 0.25 * vq)
    over = small(reconstruction_over_copy=True).eval()
    over.load_state_dict(lam.state_dict())
    assert torch.allclose(over(present, future).loss, out.reconstruction_loss / out.copy_loss + 1.25 * vq)


def test_gradients_reach_every_part_and_the_decoder_only_through_its_own_loss():
    lam = small().train()
    out = lam(*frames())
    out.loss.backward()
    for name in ("image_encoder", "inverse_dynamics", "quantizer", "forward_dynamics"):
        assert any(p.grad is not None and p.grad.any() for p in getattr(lam, name).parameters()), name
    lam.zero_grad()
    lam(*frames()).latent.continuous.sum().backward()
    assert all(p.grad is None for p in lam.forward_dynamics.parameters())
    assert any(p.grad is not None and p.grad.any() for p in lam.inverse_dynamics.parameters())


def test_one_transformer_layer_is_torchs_pre_norm_layer():
    """An independent reference: nn.TransformerEncoderLayer(norm_first=True, GELU) with the same weights."""
    from lara_adapter.lam.transformer import TransformerLayer

    ours = TransformerLayer(24, 4, 48, 1e-12)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    theirs = nn.TransformerEncoderLayer(24, 4, 48, 0.0, "gelu", 1e-12, batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        for a, b in (
            (theirs.self_attn.out_proj, ours.attention_output), (theirs.norm1, ours.attention_norm),
            (theirs.norm2, ours.mlp_norm), (theirs.linear1, ours.mlp[0]), (theirs.linear2, ours.mlp[2]),
        ):  # fmt: skip
            a.load_state_dict(b.state_dict())
    x = torch.randn(2, 7, 24)
    with torch.enable_grad():  # keeps torch from its fused path
        expected = theirs(x)
    assert torch.allclose(ours(x)[0], expected, atol=1e-5)
    assert torch.allclose(ours(x, rows=3)[0], expected[:, :3], atol=1e-5)
    assert torch.allclose(ours(x, want_weights=True)[0], expected, atol=1e-5)


def test_the_m_former_reads_queries_present_separator_future():
    lam = small(legacy_token_types=True)
    idm = lam.inverse_dynamics
    present, future = torch.randn(2, 16, 24), torch.randn(2, 16, 24)
    sequence = idm._embed(present, future, None)
    by_hand = torch.cat(
        [
            idm.queries.expand(2, -1, -1),
            idm.projection(present),
            idm.separator.expand(2, -1, -1),
            idm.projection(future),
        ],
        1,
    )
    assert torch.allclose(sequence, by_hand + idm.positions + idm.token_types[0], atol=1e-6)
    typed = small()
    typed.load_state_dict(lam.state_dict())
    difference = typed.inverse_dynamics._embed(present, future, None) - sequence
    assert not difference[:, : 3 + 16 + 1].any()
    assert torch.allclose(difference[:, 20:], (idm.token_types[1] - idm.token_types[0]).expand(2, 16, -1), atol=1e-6)


def test_attention_maps_are_those_of_the_layers():
    lam = small(difference_input=True).eval()
    maps = lam.attention(*frames())
    assert maps.shape == (4, 2, 2, 3, 2, 4, 4)
    assert (maps >= 0).all()
    assert (maps.sum((-3, -2, -1)) <= 1 + 1e-5).all()
    # a map must matter: hiding the future frame's information changes where the queries look
    present, future = frames()
    assert not torch.allclose(lam.attention(present, future), lam.attention(present, present))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("difference", [False, True])
def test_a_pair_in_which_nothing_moves_can_be_the_zero_latent(difference, normalised):
    changes = {"difference_input": difference, "normalize_latent": normalised, "initializer_range": 0.3}
    plain, lam = small(**changes).eval(), small(**changes, subtract_still=True).eval()
    lam.load_state_dict(plain.state_dict())
    present, future = frames()
    moved, still = (plain.encode(present, other).continuous for other in (future, present))
    found = lam.encode(present, future)
    torch.testing.assert_close(found.continuous, moved - still, rtol=1e-4, atol=1e-5)
    assert found.continuous.abs().mean() > 0.01
    torch.testing.assert_close(lam.encode(present, present).continuous, torch.zeros_like(moved), rtol=0, atol=1e-5)
    assert torch.equal(found.indices, lam.assign_codes(found.continuous).indices)
    assert lam.attention(present, future).shape == plain.attention(present, future).shape
    torch.testing.assert_close(lam.attention(present, future), plain.attention(present, future))
    seen = []
    lam.image_encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
    lam.train()(present, future).loss.backward()
    assert seen == [(13 if difference else 8)]  # one batch; the grey picture of no difference is encoded once
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lam.parameters())


def test_both_frames_go_through_the_encoder_in_one_batch():
    lam = small(difference_input=True)
    seen = []
    lam.image_encoder.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
    lam(*frames())
    assert seen == [12]


def test_valid_flags_equal_the_subset_and_give_invalid_pairs_no_gradient():
    lam = small(reconstruction_over_copy=True).train()
    reference = copy.deepcopy(lam)
    present, future = (f.float() / 255 for f in frames())
    valid = torch.tensor([True, False, True, False])
    future = future.requires_grad_()
    out = lam(present, future, valid=valid)
    expected = reference(present[valid], future.detach()[valid])
    for name in ("loss", "reconstruction_loss", "copy_loss", "codebook_loss", "commitment_loss"):
        assert torch.allclose(getattr(out, name), getattr(expected, name), atol=1e-6), name
    out.loss.backward()
    expected.loss.backward()
    assert not future.grad[~valid].any()
    for (name, p), q in zip(lam.named_parameters(), reference.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-5), name


@pytest.mark.parametrize("config", [SMALL, {**LatentActionConfig.tiny().to_dict()}])
def test_no_valid_pair_keeps_every_parameter_with_zero_gradient(config):
    settings = {k: v for k, v in config.items() if k not in ("schema_version", "format")}
    lam = LatentActionModel(LatentActionConfig(**settings)).train()
    out = lam(*frames(size=lam.config.image_size), valid=torch.zeros(4, dtype=torch.bool))
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in lam.parameters())


def test_predict_from_latent_tokens_and_codes():
    lam = small().eval()
    present, future = frames()
    latent = lam.encode(present, future)
    from_action = lam.predict(present, latent)
    assert from_action.shape == (4, 3, 32, 32)
    assert from_action.min() >= 0
    assert from_action.max() <= 1
    assert torch.allclose(from_action, lam.predict(present, latent.quantized))
    assert torch.allclose(from_action, lam.predict(present, latent.indices), atol=1e-5)
    assert torch.allclose(from_action, lam(present, future).reconstruction.clamp(0, 1), atol=1e-5)
    with pytest.raises(LaraArgumentError, match=r"predict: latent is \[4, 2, 4\]"):
        lam.predict(present, latent.quantized[:, :2])


def test_residual_decoder_starts_as_the_copy_and_others_do_not():
    present, future = frames()
    out = small(residual=True).eval()(present, future)
    assert torch.allclose(out.reconstruction, present.float() / 255, atol=1e-6)
    assert torch.allclose(out.reconstruction_loss, out.copy_loss)
    assert not torch.allclose(small().eval()(present, future).reconstruction, present.float() / 255, atol=0.1)


@pytest.mark.parametrize(
    "changes", [{"fusion": "concat"}, {"mask_token": True}, {"fusion": "concat", "mask_token": True}]
)
def test_fusions_condition_the_prediction_on_the_latent(changes):
    lam = small(**changes).eval()
    present, _ = frames()
    a, b = torch.randn(4, 3, 4), torch.randn(4, 3, 4)
    assert not torch.allclose(lam.predict(present, a), lam.predict(present, b), atol=1e-4)


def test_frames_of_any_size_and_kind():
    lam = small().eval()
    present, future = frames()
    as_float = lam.encode(present.float() / 255, future.float() / 255).continuous
    assert torch.allclose(lam.encode(present, future).continuous, as_float, atol=1e-5)
    large = tuple(F.interpolate(f.float() / 255, 64, mode="nearest") for f in (present, future))
    assert torch.allclose(lam.encode(*large).continuous, as_float, atol=0.2)
    with pytest.raises(FrameError):
        lam.encode(present[:, :1], future[:, :1])
    with pytest.raises(FrameError):
        lam.encode(present.long(), future.long())


def test_encode_changes_nothing_even_in_training():
    lam = small(vq_warmup_steps=2, vq_revive_every=1).train()
    before = {k: v.clone() for k, v in lam.state_dict().items()}
    lam.encode(*frames())
    assert all(torch.equal(before[k], v) for k, v in lam.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_losses_in_float32(dtype):
    lam = small().eval()
    exact = lam(*frames()).loss
    with torch.autocast("cpu", dtype=dtype):
        out = lam(*frames())
    assert out.loss.dtype == out.latent.continuous.dtype == torch.float32
    assert torch.allclose(out.loss, exact, rtol=0.05)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
def test_it_is_float32_whatever_the_default_dtype(default, tmp_path):
    torch.manual_seed(0)
    plain = small(vq_revive_every=1)
    plain.save_pretrained(tmp_path / "lam")
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        for lam in (small(vq_revive_every=1), LatentActionModel.from_pretrained(tmp_path / "lam")):
            assert torch.get_default_dtype() == default
            state = lam.state_dict()
            assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
            assert {t.dtype for t in (*state.values(), *lam.buffers()) if t.is_floating_point()} == {torch.float32}
            lam.train()(*frames()).loss.backward()  # the quantiser counts and revives
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_saved_one_is_loaded_under_a_meta_default_device(tmp_path):
    small().save_pretrained(tmp_path / "lam")
    with torch.device("meta"):
        lam = LatentActionModel.from_pretrained(tmp_path / "lam")
    assert {t.device.type for t in (*lam.parameters(), *lam.buffers())} == {"cpu"}


def test_copies_and_pickles_are_whole():
    lam = small().train()
    double = copy.deepcopy(lam)
    stream = io.BytesIO()
    torch.save(lam, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    expected = lam.eval()(*frames()).loss
    assert torch.equal(double.eval()(*frames()).loss, expected)
    assert torch.equal(again.eval()(*frames()).loss, expected)


@pytest.mark.parametrize("name", ["VectorQuantize", "FSQ", "ResidualVQ"])
def test_quantisers_of_vector_quantize_pytorch(name):
    library = pytest.importorskip("vector_quantize_pytorch")
    made = {
        "VectorQuantize": lambda: library.VectorQuantize(dim=4, codebook_size=16),
        "FSQ": lambda: library.FSQ(levels=[4, 4], dim=4),
        "ResidualVQ": lambda: library.ResidualVQ(dim=4, codebook_size=16, num_quantizers=2),
    }[name]()
    if name == "ResidualVQ" and not isinstance(getattr(made, "codebook_size", None), int):
        made.codebook_size = 16
    lam = LatentActionModel(LatentActionConfig(**SMALL), quantizer=made).train()
    present, future = frames()
    out = lam(present, future)
    out.loss.backward()
    assert isinstance(out.latent, LatentAction)
    assert any(p.grad is not None and p.grad.any() for p in lam.inverse_dynamics.parameters())
    assert out.codes_used >= 1
    assert lam.eval().predict(present, lam.encode(present, future)).shape == (4, 3, 32, 32)


def moving_squares(batch, seed):
    """A square moves left, right, up or down."""
    g = torch.Generator().manual_seed(seed)
    out = torch.full((2, batch, 3, 64, 64), 60, dtype=torch.uint8)
    for i in range(batch):
        x, y = (int(v) for v in torch.randint(16, 36, (2,), generator=g))
        dx, dy = [(10, 0), (-10, 0), (0, 10), (0, -10)][int(torch.randint(4, (1,), generator=g))]
        for t, (px, py) in enumerate(((x, y), (x + dx, y + dy))):
            out[t, i, 0, py : py + 14, px : px + 14] = 230
    return out[0], out[1]


@pytest.mark.slow
def test_tiny_learns_what_moves(trained_tiny):
    """In 150 steps the prediction beats copying the frame clearly, and many codes are in use."""
    health = trained_tiny.health([moving_squares(64, 10_000 + i) for i in range(2)])
    assert health.ratio < 0.75
    assert health.codes_used > 10


def test_health_by_hand():
    lam = small().eval()
    present, future = frames(8)
    health = lam.health([(present[:4], future[:4]), (present[4:], future[4:])])
    out = lam(present, future)
    assert health.ratio == pytest.approx((out.reconstruction_loss / out.copy_loss).item(), rel=1e-4)
    z = out.latent.continuous.flatten(1)
    unit = z / z.norm(dim=1, keepdim=True)
    assert health.mean_direction == pytest.approx(unit.mean(0).square().sum().item(), rel=1e-3)
    assert health.codes_used == len(out.latent.indices.unique())
