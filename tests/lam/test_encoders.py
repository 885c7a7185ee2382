"""Frozen vision backbones of transformers, built tiny and loaded from a folder."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from lara_adapter import HubError, LaraArgumentError, LatentActionConfig, LatentActionModel
from lara_adapter.lam.image_encoder import describe_image_encoder

transformers = pytest.importorskip("transformers")

SIDES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
REST = dict(
    image_size=32, queries=2, latent_dim=4, idm_width=16, idm_layers=1, idm_heads=2, idm_mlp=32, fdm_width=16,
    fdm_layers=1, fdm_heads=2, fdm_mlp=32, fdm_patch_size=8, codebook_size=8, perceptual_weight=0.0,
)  # fmt: skip


def mae(folder):
    config = transformers.ViTMAEConfig(
        **SIDES, patch_size=8, decoder_num_hidden_layers=1, decoder_hidden_size=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    model = transformers.ViTMAEModel(config).eval()
    model.save_pretrained(folder)
    return model


def dinov2(folder):
    transformers.Dinov2Model(transformers.Dinov2Config(**SIDES, patch_size=8, mlp_ratio=2)).save_pretrained(folder)


def clip(folder):
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIDES, patch_size=8)).save_pretrained(folder)


def siglip(folder):
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIDES, patch_size=8)).save_pretrained(folder)


def frames(batch=3):
    return torch.rand(batch, 3, 32, 32), torch.rand(batch, 3, 32, 32)


@pytest.fixture
def lam(tmp_path):
    mae(tmp_path / "mae")
    return LatentActionModel(LatentActionConfig(**describe_image_encoder(str(tmp_path / "mae")), **REST))


def test_vit_mae_keeps_reading_order_where_transformers_shuffles(tmp_path):
    """HF shuffles the patches even at mask_ratio 0: two calls differ. Ours agree, and equal theirs un-shuffled."""
    model = mae(tmp_path / "mae")
    model.config.mask_ratio = 0.0
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        first, second = model(images), model(images)
    assert not torch.allclose(first.last_hidden_state, second.last_hidden_state)
    patches = first.last_hidden_state[:, 1:].gather(1, first.ids_restore[..., None].expand(-1, -1, 32))
    settings = describe_image_encoder(str(tmp_path / "mae"))
    assert settings["encoder_prefix_tokens"] == 1
    lam = LatentActionModel(LatentActionConfig(**settings, **REST, image_mean=(0, 0, 0), image_std=(1, 1, 1)))
    ours = lam.image_encoder(images)
    assert torch.equal(ours, lam.image_encoder(images))
    assert torch.allclose(ours[:, 1:], patches, atol=1e-5)
    assert torch.allclose(ours[:, :1], first.last_hidden_state[:, :1], atol=1e-5)


@pytest.mark.parametrize("build", [mae, dinov2, clip, siglip])
def test_any_backbone(build, tmp_path):
    build(tmp_path / "b")
    settings = describe_image_encoder(str(tmp_path / "b"))
    assert settings["encoder_patch_size"] == 8
    lam = LatentActionModel(LatentActionConfig(**settings, **REST)).train()
    out = lam(*frames())
    out.loss.backward()
    assert all(p.grad is not None for p in lam.parameters())
    assert lam.attention(*frames()).shape[-2:] == (4, 4)


def test_normalises_with_the_configured_mean_and_std(tmp_path):
    mae(tmp_path / "mae")
    settings = describe_image_encoder(str(tmp_path / "mae"))
    plain = LatentActionModel(LatentActionConfig(**settings, **REST, image_mean=(0, 0, 0), image_std=(1, 1, 1)))
    normal = LatentActionModel(LatentActionConfig(**settings, **REST))
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(normal.image_encoder(images), plain.image_encoder((images - mean) / std), atol=1e-4)


def test_the_frozen_encoder_is_outside_the_tree_and_always_in_eval(lam):
    assert not any("image_encoder" in name for name in lam.state_dict())
    assert not any("image_encoder" in name for name, _ in lam.named_parameters())
    network = lam.image_encoder.network
    lam.train()
    lam.requires_grad_(True)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_it_moves_with_the_model(lam, monkeypatch):
    """There is no second device here: a move is played by a function that says where a tensor went."""
    moved = []
    monkeypatch.setattr(lam.image_encoder.network, "to", moved.append)
    monkeypatch.setattr(lam.image_encoder, "mean", torch.zeros(1))
    lam.image_encoder.mean.to = lam.image_encoder.std.to = lambda device: torch.zeros(1)
    lam.image_encoder._apply(lambda tensor: SimpleNamespace(device=torch.device("cuda", 1)))
    assert moved == [torch.device("cuda", 1)]
    assert lam.image_encoder.home == torch.device("cuda", 1)


def test_a_cast_of_the_model_does_not_round_it(lam):
    before = next(lam.image_encoder.network.parameters()).clone()
    lam.to(torch.bfloat16).float()
    assert torch.equal(next(lam.image_encoder.network.parameters()), before)


def test_a_copy_has_the_same_encoder(lam):
    pair = frames()
    assert torch.equal(copy.deepcopy(lam).eval().encode(*pair).continuous, lam.eval().encode(*pair).continuous)


def test_save_and_load_leave_the_backbone_where_it_is(lam, tmp_path):
    lam.eval().save_pretrained(tmp_path / "lam")
    again = LatentActionModel.from_pretrained(tmp_path / "lam")
    pair = frames()
    assert torch.equal(again(*pair).loss, lam(*pair).loss)
    from safetensors import safe_open

    with safe_open(tmp_path / "lam" / "model.safetensors", "pt") as file:
        assert not any("image_encoder" in name for name in file.keys())  # noqa: SIM118


def test_a_configuration_that_does_not_fit_names_the_right_values(tmp_path):
    mae(tmp_path / "mae")
    settings = describe_image_encoder(str(tmp_path / "mae"))
    with pytest.raises(
        LaraArgumentError, match=r"the image encoder has .*'encoder_width': 32.*but the configuration says"
    ):
        LatentActionModel(LatentActionConfig(**{**settings, **REST, "encoder_width": 48}))


def test_pickled_weights_and_missing_backbones_are_refused(tmp_path):
    model = mae(tmp_path / "mae")
    (tmp_path / "mae" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "mae" / "pytorch_model.bin")
    with pytest.raises(LaraArgumentError, match="cannot be loaded"):
        describe_image_encoder(str(tmp_path / "mae"))
    with pytest.raises(HubError, match=r"image_encoder='nobody/nothing'.*the Hub is not asked"):
        LatentActionModel(LatentActionConfig(image_encoder="nobody/nothing", perceptual_weight=0.0))


def test_without_transformers_the_message_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LaraArgumentError, match=r"pip install 'lara-adapter\[lam\]'"):
        LatentActionModel(LatentActionConfig.paper(perceptual_weight=0.0))


def test_defaults_of_the_host_do_not_reach_the_encoder(lam):
    """A policy may be loaded under a 16-bit default dtype, or on the meta device."""
    expected = lam.image_encoder(frames()[0].fill_(0.3))
    for ambient in (torch.bfloat16, None):
        torch.set_default_dtype(ambient or torch.float32)
        try:
            with torch.device("cpu" if ambient else "meta"):
                other = LatentActionModel(lam.config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(other.image_encoder(frames()[0].fill_(0.3)), expected)
