"""`lara inspect` on the hosts' own code, each in its own environment; skipped where the host is not installed.

GR00T: set LARA_GR00T_SRC to a checkout of Isaac GR00T (n1.6-release) if it is not installed.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
from lara_adapter.integrations.loading import open_policy
from lara_adapter.integrations.skeleton import skeleton

from lara_adapter import PolicySourceError, attach_lara, cli
from lara_adapter.inspection import describe_policy

pytestmark = pytest.mark.slow


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    pytest.importorskip("tyro")
    assert cli.main(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------- GR00T N1.6


@pytest.fixture
def gr00t_folder(tmp_path, monkeypatch):
    """A folder with the configuration of GR00T-N1.6-3B, as its code has it: 32 blocks of width 1536."""
    source = os.environ.get("LARA_GR00T_SRC")
    if source:
        monkeypatch.setattr(sys, "path", [source, *sys.path])
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    pytest.importorskip("gr00t", reason="Isaac GR00T is not installed; LARA_GR00T_SRC names a checkout")
    configs = pytest.importorskip("gr00t.configs.model.gr00t_n1d6")
    configs.Gr00tN1d6Config(max_state_dim=128, max_action_dim=128, action_horizon=50).save_pretrained(tmp_path)
    return tmp_path


def test_gr00t_in_full_size_without_weights_gpu_and_flash_attn(gr00t_folder, capsys):
    report = inspect(capsys, str(gr00t_folder))
    assert (report["policy_class"], report["family"], report["found_by"]) == ("Gr00tN1d6", "gr00t-n1.6", "table")
    assert report["blocks"] == "action_head.model.transformer_blocks"
    assert (report["depth"], report["width"]) == (32, 1536)
    assert (report["layer"], report["tap"]) == (30, "action_head.model.transformer_blocks.29")
    assert (report["action_tokens"], report["frames"], report["adapter"]) == ("last", "lara_frames", "lara")
    assert report["projector_parameters"] == 1536 * 3072 + 3072 + 3072 * 256 + 256
    assert 3.0e9 < report["policy_parameters"] < 3.6e9
    assert report["trainable_blocks_below"] == 30


def test_gr00t_trained_on_its_projector_alone_is_warned_of(gr00t_folder):
    config = json.loads((gr00t_folder / "config.json").read_text())
    (gr00t_folder / "config.json").write_text(json.dumps({**config, "tune_diffusion_model": False}))
    report = describe_policy(open_policy(gr00t_folder))
    assert report.trainable_blocks_below == 0
    assert report.trainable_elsewhere > 0
    assert "no block at or below the tap is trainable" in report.warnings[0]


def test_gr00t_with_weights_and_as_attach_lara_sees_it(gr00t_folder):
    import torch
    from gr00t.model.gr00t_n1d6.gr00t_n1d6 import Gr00tN1d6
    from helpers.toys import OwnLam

    from examples.gr00t_tiny import tiny_backbone, tiny_config

    with tiny_backbone():
        Gr00tN1d6(tiny_config()).save_pretrained(gr00t_folder)
        first, second = (open_policy(gr00t_folder, weights=True) for _ in range(2))
        bare = open_policy(gr00t_folder)
    assert not any(p.is_meta for p in first.parameters())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.is_meta for p in bare.parameters())
    report = describe_policy(bare, OwnLam())
    assert describe_policy(first, OwnLam()) == report
    lara = attach_lara(first, OwnLam())
    assert (lara.config.tap, lara.config.layer) == (report.tap, report.layer)
    assert report.added == sum(p.numel() for p in lara.parameters())


# ---------------------------------------------------------------------- LeRobot


def features(size: int) -> dict:
    types = pytest.importorskip("lerobot.configs.types")
    feature, kind = types.PolicyFeature, types.FeatureType
    return {
        "input_features": {
            "observation.images.cam": feature(kind.VISUAL, (3, size, size)),
            "observation.state": feature(kind.STATE, (4,)),
        },
        "output_features": {"action": feature(kind.ACTION, (3,))},
    }


@pytest.mark.parametrize(("name", "policy_class"), [("pi05", "PI05Policy"), ("pi0", "PI0Policy")])
def test_lerobot_pi_in_full_size_without_weights(tmp_path, capsys, name, policy_class):
    pytest.importorskip("lerobot")
    from lerobot.policies.factory import make_policy_config

    make_policy_config(name, device="cpu", **features(224))._save_pretrained(tmp_path)
    report = inspect(capsys, str(tmp_path))
    assert (report["policy_class"], report["family"]) == (policy_class, "lerobot-pi")
    assert (report["depth"], report["width"], report["layer"]) == (18, 1024, 16)
    path = "model.paligemma_with_expert.gemma_expert.model"
    assert (report["tap"], report["tap_kind"]) == (f"{path}.layers.16.input_layernorm", "input")
    assert (report["frames"], report["adapter"]) == ("observation.lara.frames", "model.lara")
    assert report["policy_parameters"] > 3.5e9


@pytest.fixture
def multi_task_dit(tmp_path):
    """A real multi-task DiT, its CLIP tiny and in a folder."""
    pytest.importorskip("lerobot")
    from transformers import CLIPConfig, CLIPModel

    lerobot = pytest.importorskip("lerobot.policies.multi_task_dit.configuration_multi_task_dit")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    clip = tmp_path / "tiny-clip"
    CLIPModel(
        CLIPConfig(
            projection_dim=16, text_config={**tower, **text}, vision_config={**tower, "image_size": 32, "patch_size": 16}
        )
    ).save_pretrained(clip)  # fmt: skip
    config = lerobot.MultiTaskDiTConfig(
        device="cpu", objective="flow_matching", n_obs_steps=1, horizon=8, n_action_steps=8, hidden_dim=32, num_layers=3,
        num_heads=4, timestep_embed_dim=16, vision_encoder_name=str(clip), text_encoder_name=str(clip),
        image_resize_shape=(32, 32), image_crop_shape=None, **features(32),
    )  # fmt: skip
    folder = tmp_path / "policy"
    folder.mkdir()
    config._save_pretrained(folder)
    return folder


def test_lerobot_multi_task_dit_as_attach_lara_sees_it(multi_task_dit):
    from helpers.toys import OwnLam

    report = describe_policy(open_policy(multi_task_dit), OwnLam(), -1)
    assert (report.family, report.depth, report.width) == ("lerobot-multi-task-dit", 3, 32)
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    policy = get_policy_class("multi_task_dit")(PreTrainedConfig.from_pretrained(multi_task_dit))
    assert describe_policy(policy, OwnLam(), -1) == report
    lara = attach_lara(policy, OwnLam(), -1)
    assert lara.config.tap == report.tap
    assert policy.get_submodule(report.adapter) is lara


def test_lerobot_with_weights(multi_task_dit):
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    policy = get_policy_class("multi_task_dit")(PreTrainedConfig.from_pretrained(multi_task_dit))
    policy.save_pretrained(multi_task_dit)
    loaded = open_policy(multi_task_dit, weights=True)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))


def test_lerobot_type_that_is_not_there(tmp_path):
    pytest.importorskip("lerobot")
    (tmp_path / "config.json").write_text('{"type": "no_such_policy"}')
    with pytest.raises(PolicySourceError, match="no_such_policy"):
        open_policy(tmp_path)


def test_a_skeleton_has_the_parameters_of_the_real_policy(multi_task_dit):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    config = PreTrainedConfig.from_pretrained(multi_task_dit)
    policy_class = get_policy_class("multi_task_dit")
    with skeleton():
        bare = policy_class(config)
    real = {name: (p.shape, p.requires_grad) for name, p in policy_class(config).named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in bare.named_parameters()} == real
