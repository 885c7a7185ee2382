"""`describe_policy` says what `attach_lara` would do, without doing it."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.toys import BypassPolicy, DitPolicy, OwnLam
from torch import nn

from examples.mini_vla import MiniVLA
from lara_adapter import (
    AdapterFormatError,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    PolicySpec,
    attach_lara,
    policies,
    register_policy,
)
from lara_adapter.inspection import describe_policy
from lara_adapter.lam.model import count_parameters

ARGUMENTS = (
    {},
    {"layer": -1},
    {"layer": 0},
    {"layer": "L-2", "token": "mean_valid"},
    {"token": 2, "projector": "linear"},
    {"projector": nn.Linear(16, 8)},
    {"train_lam": False},
    {"blocks": "transformer_blocks", "layer": 1},
)


@pytest.fixture
def _table(monkeypatch):
    monkeypatch.setattr(policies, "_TABLE", list(policies._TABLE))


def fingerprint(policy: nn.Module) -> dict:
    return {
        "class": type(policy),
        "modules": {name: id(module) for name, module in policy.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in policy.named_modules()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.modules()],
        "state": {name: (id(t), t._version, t.requires_grad) for name, t in policy.named_parameters()},
        "training": [module.training for module in policy.modules()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_it_says_what_attaching_then_does(arguments):
    policy, lam = DitPolicy().train(), OwnLam()
    before = fingerprint(policy)
    report = describe_policy(policy, lam, **arguments)
    assert fingerprint(policy) == before
    own, own_trainable = (sum(p.numel() for p in policy.parameters()),) * 2
    lara = attach_lara(policy, lam, **arguments)
    assert report.ok
    assert not report.warnings
    assert (report.policy_parameters, report.policy_trainable) == (own, own_trainable)
    assert (report.tap, report.tap_kind, report.layer) == (lara.config.tap, lara.config.tap_kind, lara.config.layer)
    assert (report.blocks, report.depth) == (lara.config.blocks, lara.config.depth)
    assert report.width == 16
    assert report.latent_width == lara.config.latent_width
    assert report.token == lara.config.token
    assert report.frames == lara.config.frames
    assert report.family == lara.config.policy_family
    assert policy.get_submodule(report.adapter) is lara
    assert report.added == sum(p.numel() for p in lara.parameters())
    assert report.added_trainable == sum(p.numel() for p in lara.parameters() if p.requires_grad)
    assert report.added == sum(p.numel() for p in policy.parameters()) - own


def test_a_policy_on_the_meta_device_is_described_like_a_real_one():
    real = describe_policy(DitPolicy(), OwnLam())
    with torch.device("meta"):
        policy = DitPolicy()
    report = describe_policy(policy, OwnLam())
    assert report == real
    assert all(p.is_meta for p in policy.parameters())


def test_nothing_is_allocated_for_a_large_projector():
    with torch.device("meta"):
        policy = DitPolicy(depth=2, width=65536)  # its mlp projector would be 34 GB
    report = describe_policy(policy, layer=-1)
    assert report.projector_parameters == 65536 * 131072 + 131072 + 131072 * 256 + 256


def test_without_a_lam_the_paper_is_assumed_and_nothing_is_downloaded():
    report = describe_policy(DitPolicy())
    assert report.lam_assumed
    assert (report.latent_shape, report.latent_width) == ((8, 32), 256)
    assert report.lam_parameters == count_parameters(LatentActionConfig.paper()) > 100_000_000
    assert report.outside == {"facebook/vit-mae-large": None, "LPIPS": None}
    assert "assumed" in str(report)


@pytest.mark.parametrize("changes", [{}, {"encoder_layers": 2, "fusion": "add", "mask_token": True}], ids=str)
def test_the_parameters_of_a_configuration_are_those_of_its_model(changes, tmp_path):
    config = LatentActionConfig.tiny(**changes)
    lam = LatentActionModel(config)
    assert count_parameters(config) == sum(p.numel() for p in lam.parameters())
    lam.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # only the configuration is read
    whole, from_config, from_folder = (describe_policy(DitPolicy(), given) for given in (lam, config, tmp_path))
    assert whole.added == from_config.added == from_folder.added
    assert whole.latent_shape == from_config.latent_shape == from_folder.latent_shape
    assert not from_folder.lam_assumed


def test_a_frozen_encoder_is_counted_outside_the_tree():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"patch_size": 8, "model_type": "toy"})()
            self.embed = nn.Conv2d(3, 64, 8, 8)

        def forward(self, pixel_values):
            tokens = self.embed(pixel_values).flatten(2).transpose(1, 2)
            return type("Output", (), {"last_hidden_state": tokens})()

    lam = LatentActionModel(LatentActionConfig.tiny(image_encoder="toy"), backbone=Backbone())
    report = describe_policy(DitPolicy(), lam)
    assert report.outside == {"Backbone": 64 * 3 * 64 + 64}
    assert report.lam_parameters == count_parameters(lam.config) == sum(p.numel() for p in lam.parameters())


@pytest.mark.usefixtures("_table")
def test_a_row_of_the_table():
    register_policy(
        PolicySpec(
            "walked", ("helpers:BypassPolicy",), "layers", tap="norm", final_norm="norm", action_tokens="first",
            frames="my.frames", owner="norm", draws="tile",
        )
    )  # fmt: skip
    policy = BypassPolicy()
    report = describe_policy(policy, OwnLam())
    assert (report.family, report.found_by) == ("walked", "table")
    assert (report.tap, report.tap_kind, report.layer) == ("layers.2.input_layernorm", "input", 2)
    assert (report.frames, report.frames_valid) == ("my.frames", "my.frames_valid")
    lara = attach_lara(policy, OwnLam())
    assert policy.get_submodule(report.adapter) is lara
    text = str(report)
    assert "known to the policy table" in text
    assert "the first T positions" in text
    assert "tiled" in text
    assert "policy.norm.lara" in text


def test_several_candidates_are_listed_and_none_is_guessed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.action_left, self.action_right = DitPolicy(), BypassPolicy()

        def forward(self, batch):
            return self.action_right(batch)

    report = describe_policy(Two())
    assert not report.ok
    assert [c["path"] for c in report.candidates] == ["action_left.transformer_blocks", "action_right.layers"]
    assert report.candidates[0] == {"path": "action_left.transformer_blocks", "count": 5, "block": "Block"}
    text = str(report)
    assert "CANNOT      attach LARA: Two has several lists of attention blocks" in text
    assert "candidate   action_right.layers: 4 x BypassLayer" in text
    assert report.tap is None
    assert report.added is None
    named = describe_policy(Two(), blocks="action_right.layers")
    assert named.ok
    assert named.found_by == "user"


@pytest.mark.parametrize("arguments", [{"layer": 9}, {"blocks": "nowhere"}, {"blocks": "state_in"}], ids=str)
def test_what_does_not_fit_this_policy_is_a_finding(arguments):
    report = describe_policy(DitPolicy(), **arguments)
    assert not report.ok
    assert "transformer_blocks: 5 x Block" in str(report)


def test_a_policy_without_attention_blocks():
    report = describe_policy(nn.Linear(2, 2))
    assert "no list of attention blocks found" in report.error
    assert report.candidates == []


def test_an_attached_policy():
    policy = DitPolicy()
    attach_lara(policy, OwnLam())
    assert "has LARA already" in describe_policy(policy).error


@pytest.mark.parametrize(
    "arguments",
    [
        {"token": "first"},
        {"projector": "conv"},
        {"layer": "two"},
        {"lam": nn.Linear(2, 2)},
        {"lam": 3},
    ],
    ids=str,
)
def test_what_is_wrong_for_every_policy_is_raised(arguments):
    with pytest.raises(LaraArgumentError):
        describe_policy(DitPolicy(), **arguments)


def test_other_wrong_arguments(tmp_path):
    with pytest.raises(LaraArgumentError, match="policy is a str"):
        describe_policy("policy")
    with pytest.raises(AdapterFormatError):
        describe_policy(DitPolicy(), tmp_path)


def test_frozen_blocks_below_the_tap_are_a_warning():
    policy = DitPolicy()
    policy.transformer_blocks.requires_grad_(False)
    report = describe_policy(policy)
    assert (report.blocks_below, report.trainable_blocks_below) == (3, 0)
    assert report.trainable_elsewhere == report.policy_trainable > 0
    assert "WARNING     no block at or below the tap is trainable: the alignment reaches at most" in str(report)
    policy.requires_grad_(False)
    assert "LARA trains its projector and the LAM, and not the policy" in str(describe_policy(policy))
    policy.transformer_blocks[4].requires_grad_(True)  # above the tap: does not help
    assert describe_policy(policy).trainable_blocks_below == 0
    assert "TapDetached" in str(describe_policy(policy))
    policy.transformer_blocks[0].requires_grad_(True)
    assert not describe_policy(policy).warnings


def test_unknown_width_is_a_finding_unless_the_projector_is_given():
    class Attention(nn.Module):
        def forward(self, x):
            return x

    class Mute(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

    policy = nn.Module()
    policy.blocks = nn.ModuleList(Mute() for _ in range(3))
    assert "the width of the blocks' hidden state is unknown" in describe_policy(policy).error
    assert describe_policy(policy, projector=nn.Linear(4, 256)).projector_parameters == 4 * 256 + 256


def test_as_json_and_as_text():
    report = describe_policy(MiniVLA(), LatentActionConfig.tiny(), token=-1)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["ok"] is True
    assert content["latent_shape"] == [8, 32]
    assert content["added"] == report.added
    assert content["added_relative"] == pytest.approx(report.added / report.policy_parameters)
    assert describe_policy(MiniVLA(), token=lambda hidden, batch: hidden[:, 0]).to_dict()["token"] == "callable"
    text = str(report)
    for said in (
        "MiniVLA; family: generic, found by structure",
        "action_head.model.transformer_blocks: 4 x DiTBlock, width 96",
        "after block 2 of 4",
        "the last T positions",
        'batch["action_mask"]',
        'batch["lara_frames"]',
        'batch["lara_frames_valid"]',
        "attach_lara(frames=callable)",
        "registered as policy.lara",
        f"{report.added:,} parameters",
    ):
        assert said in text


def test_a_policy_with_lora_is_looked_at_inside_its_wrapper():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(DitPolicy(), peft.LoraConfig(r=2, target_modules=["mlp.0"]))
    report = describe_policy(wrapped, OwnLam())
    assert report.policy_class == "DitPolicy"
    assert report.tap == "transformer_blocks.2"
    assert report.policy_trainable == 5 * 2 * (16 + 32)
    assert (report.trainable_blocks_below, report.trainable_elsewhere) == (3, 0)
