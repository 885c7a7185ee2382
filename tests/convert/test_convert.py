"""The official tokenizer's layout and ours, there and back; the official code itself is not needed."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lara_adapter import AdapterFormatError, LatentActionConfig, LatentActionModel
from lara_adapter.convert import (
    config_from_official,
    config_to_official,
    official_shapes,
    state_from_official,
    state_to_official,
)

SMALL = dict(
    image_size=32, image_encoder="tiny", image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0), encoder_patch_size=8,
    encoder_width=20, queries=3, latent_dim=4, idm_width=24, idm_layers=2, idm_heads=2, idm_mlp=40, fdm_width=16,
    fdm_layers=1, fdm_heads=2, fdm_mlp=36, fdm_patch_size=8, codebook_size=10, perceptual_weight=0.0,
    legacy_token_types=True, legacy_commitment=True,
)  # fmt: skip

# The official names of a model with one layer in each transformer and fusion "add", as its state_dict has them.
LAYER = [
    f"{name}.{kind}"
    for name in (
        "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense",
        "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
    )
    for kind in ("weight", "bias")
]  # fmt: skip
NAMES = [
    "m_former.embeddings.latent_motion_token", "m_former.embeddings.sep_token", "m_former.embeddings.position_embeddings",
    "m_former.embeddings.token_type_embeddings", "m_former.embeddings.projection.weight",
    "m_former.embeddings.projection.bias", "m_former.layernorm.weight", "m_former.layernorm.bias",
    *(f"m_former.encoder.layer.0.{name}" for name in LAYER),
    "vector_quantizer.embedding.weight",
    *(f"vq_{way}_resampler.{number}.{kind}" for way in ("down", "up") for number in (0, 2) for kind in ("weight", "bias")),
    "decoder.transformer.embeddings.position_embeddings",
    "decoder.transformer.embeddings.patch_embeddings.projection.weight",
    "decoder.transformer.embeddings.patch_embeddings.projection.bias",
    "decoder.transformer.embeddings.query_pooling_layer.weight",
    "decoder.transformer.embeddings.query_pooling_layer.bias",
    *(f"decoder.transformer.encoder.layer.0.{name}" for name in LAYER),
    "decoder.transformer.layernorm.weight", "decoder.transformer.layernorm.bias", "decoder.decoder.0.weight",
    "decoder.decoder.0.bias",
]  # fmt: skip


class Backbone(nn.Module):
    """A frozen encoder of 17 tokens: one in front, sixteen patches."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(patch_size=8)
        self.patches = nn.Conv2d(3, 20, 8, 8)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return SimpleNamespace(last_hidden_state=torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1))


def small(**changes):
    torch.manual_seed(0)
    lam = LatentActionModel(LatentActionConfig(**{**SMALL, **changes}), backbone=Backbone())
    for parameter in lam.parameters():  # nothing may hide behind zeros and ones
        nn.init.normal_(parameter)
    return lam


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"legacy_token_types": False, "legacy_commitment": False},
        {"fusion": "concat"},
        {"mask_token": True},
        {"fusion": "concat", "mask_token": True, "idm_layers": 1, "fdm_layers": 3},
    ],
)
def test_there_and_back_is_bit_identical(changes):
    lam = small(**changes)
    official = state_to_official(lam.state_dict(), lam.config)
    assert {name: tuple(tensor.shape) for name, tensor in official.items()} == official_shapes(lam.config)
    settings = json.loads(json.dumps(config_to_official(lam.config)))
    config = config_from_official(settings, image_encoder="tiny")
    assert config == lam.config
    back = state_from_official(official, config)
    own = lam.state_dict()
    assert back.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype, name
    again = state_to_official(back, config)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in official.items())
    fresh = LatentActionModel(config, backbone=copy.deepcopy(lam.image_encoder.network)).eval()
    fresh.load_state_dict(back, strict=True)
    frames = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh(*frames).loss, lam.eval()(*frames).loss)


def test_the_names_are_those_of_the_official_state_dict():
    lam = small(idm_layers=1, fdm_layers=1)
    official = state_to_official(lam.state_dict(), lam.config)
    assert sorted(official) == sorted(NAMES)
    # as transformers' ViT has them: separate key and value, a 1 x 1 convolution at the end
    assert official["m_former.encoder.layer.0.attention.attention.key.weight"].shape == (24, 24)
    assert official["decoder.decoder.0.weight"].shape == (3 * 8 * 8, 16, 1, 1)
    key, value = lam.inverse_dynamics.layers[0].key_value.weight.chunk(2)
    assert torch.equal(official["m_former.encoder.layer.0.attention.attention.key.weight"], key)
    assert torch.equal(official["m_former.encoder.layer.0.attention.attention.value.weight"], value)


def test_nothing_is_shared_with_the_source():
    lam = small()
    official = state_to_official(lam.state_dict(), lam.config)
    before = {name: tensor.clone() for name, tensor in official.items()}
    for parameter in lam.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(official[name], tensor) for name, tensor in before.items())
    own = state_from_official(official, lam.config)
    for tensor in official.values():
        tensor.zero_()
    assert own["forward_dynamics.head.weight"].any()


def test_the_codes_in_use_are_written():
    """Codes that were set from data are weight + offset; the official layout has one tensor."""
    lam = small(vq_warmup_steps=1).train()
    with pytest.raises(AdapterFormatError, match=r"quantizer\.ready"):
        state_to_official(lam.state_dict(), lam.config)
    frames = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)
    lam(*frames)
    assert lam.quantizer.offset.any()
    official = state_to_official(lam.state_dict(), lam.config)
    codes = lam.quantizer.indices_to_codes(torch.arange(10))
    assert torch.equal(official["vector_quantizer.embedding.weight"], codes)
    lam.load_state_dict(state_from_official(official, lam.config))
    assert torch.equal(lam.quantizer.indices_to_codes(torch.arange(10)), codes)


@pytest.mark.parametrize("name", ["m_former.embeddings.sep_token", "decoder.decoder.0.bias"])
def test_an_official_state_with_a_tensor_missing_unknown_or_misshapen(name):
    lam = small()
    official = state_to_official(lam.state_dict(), lam.config)
    with pytest.raises(AdapterFormatError, match=f"1 tensors missing .*{name}"):
        state_from_official({k: v for k, v in official.items() if k != name}, lam.config)
    with pytest.raises(AdapterFormatError, match=r"1 unknown .*image_encoder\.cls"):
        state_from_official({**official, "image_encoder.cls": torch.zeros(1)}, lam.config)
    with pytest.raises(AdapterFormatError, match=rf"{name} has shape \[2, 2\]"):
        state_from_official({**official, name: torch.zeros(2, 2)}, lam.config)


@pytest.mark.parametrize("name", ["inverse_dynamics.separator", "quantizer.weight", "quantizer.usage"])
def test_a_state_of_ours_with_a_tensor_missing_or_unknown(name):
    lam = small()
    state = lam.state_dict()
    with pytest.raises(AdapterFormatError, match=f"1 tensors missing .*{name}"):
        state_to_official({k: v for k, v in state.items() if k != name}, lam.config)
    with pytest.raises(AdapterFormatError, match=r"1 unknown .*extra"):
        state_to_official({**state, "extra": torch.zeros(1)}, lam.config)


def test_a_state_of_ours_with_a_misshapen_tensor():
    lam = small()
    with pytest.raises(AdapterFormatError, match=r"inverse_dynamics\.separator has shape \[2, 2\]"):
        state_to_official({**lam.state_dict(), "inverse_dynamics.separator": torch.zeros(2, 2)}, lam.config)


def test_a_key_value_of_odd_length_is_refused():
    """It is split in two: a shape that only looks right after the split must not pass."""
    lam = small()
    name = "inverse_dynamics.layers.0.key_value.bias"
    with pytest.raises(AdapterFormatError, match=name):
        state_to_official({**lam.state_dict(), name: torch.zeros(47)}, lam.config)


@pytest.mark.parametrize(
    "change", [{"difference_input": True}, {"normalize_latent": True}, {"subtract_still": True}, {"residual": True}]
)
def test_parts_that_the_official_model_has_not(change):
    lam = small(**change)
    with pytest.raises(AdapterFormatError, match=next(iter(change))):
        state_to_official(lam.state_dict(), lam.config)
    with pytest.raises(AdapterFormatError, match=next(iter(change))):
        config_to_official(lam.config)


def test_the_own_encoder_is_refused():
    with pytest.raises(AdapterFormatError, match="own encoder"):
        official_shapes(LatentActionConfig.tiny(difference_input=False, normalize_latent=False, residual=False))


def published():
    """The settings published with LARA, as numbers."""
    vit = dict(
        query_num=8, attention_probs_dropout_prob=0.0, hidden_act="gelu", hidden_dropout_prob=0.0, hidden_size=768,
        initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-12, num_attention_heads=12, qkv_bias=True,
    )  # fmt: skip
    return {
        "_target_": "os.system",
        "codebook_dim": 32,
        "commit_loss_w": 1.0,
        "recon_loss_w": 1.0,
        "perceptual_loss_w": 1.0,
        "image_encoder_config": {"_target_": "os.system", "pretrained_model_name_or_path": "/somebody/elses/folder"},
        "m_former_config": {
            "add_pooling_layer": False,
            "config": {**vit, "input_hidden_size": 1024, "num_patches": 197, "num_hidden_layers": 4},
        },
        "vector_quantizer_config": {"n_e": 128, "e_dim": 32, "beta": 0.25, "remap": None, "sane_index_shape": True},
        "decoder_config": {
            "config": {**vit, "num_hidden_layers": 12, "image_size": 224, "num_channels": 3, "patch_size": 16,
                       "encoder_stride": 16, "num_patches": 196},
        },
    }  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_the_published_settings_are_the_papers(nested):
    values = {"_target_": "os.system", "config": published()} if nested else published()
    wanted = LatentActionConfig.paper(
        legacy_token_types=True, legacy_commitment=True, image_mean=(0.0,) * 3, image_std=(1.0,) * 3
    )
    config = config_from_official(values)
    assert config == wanted
    assert config.image_encoder == "facebook/vit-mae-large"


def put(values, path, value):
    *parents, last = path.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("codebook_dim", 16),
        ("commit_loss_w", 0.5),
        ("hidden_state_decoder_config", {"config": {}}),
        ("m_former_config", None),
        ("m_former_config.add_pooling_layer", True),
        ("m_former_config.config.hidden_size", "768"),
        ("m_former_config.config.hidden_act", "relu"),
        ("m_former_config.config.hidden_dropout_prob", 0.1),
        ("m_former_config.config.num_patches", 211),
        ("m_former_config.config.legacy", "no"),
        ("vector_quantizer_config.n_e", None),
        ("vector_quantizer_config.remap", "codes.npy"),
        ("decoder_config.config.encoder_stride", 8),
        ("decoder_config.config.is_io_hidden_states", True),
        ("decoder_config.config.num_patches", 100),
        ("decoder_config.config.qkv_bias", False),
        ("decoder_config.config.query_num", 4),
        ("decoder_config.config.num_attention_heads", 7),
        ("decoder_config.config.query_fusion_mode", "cross"),
        ("decoder_config.config.patch_size", 0),
        ("decoder_config.config.patch_size", 16.0),
    ],
)
def test_settings_without_a_counterpart_are_refused_by_name(path, value):
    values = published()
    put(values, path, value)
    name = path.split(".")[-1]
    other = {"codebook_dim": "e_dim", "num_attention_heads": "fdm_heads", "query_fusion_mode": "fusion"}.get(name, name)
    with pytest.raises(AdapterFormatError, match=other):
        config_from_official(values)


def test_what_is_no_configuration():
    with pytest.raises(AdapterFormatError, match="list"):
        config_from_official([])
