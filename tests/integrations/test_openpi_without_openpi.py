"""The openpi integration as far as it needs no openpi: the transform, the files, and what it says without openpi."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.toys import DitPolicy, OwnLam, make_batch
from lara_adapter.integrations.openpi import (
    FramePlan,
    KeepFrames,
    LaraDataLoader,
    OpenpiLaraSettings,
    attach,
    create_data_loader,
    find_training_script,
    load_policy,
    observation_frames,
    run,
    save_policy,
)
from lara_adapter.integrations.openpi.checkpoints import CheckpointFiles, latest_checkpoint
from safetensors.torch import load_file, save_model

from lara_adapter import (
    AttachOrderError,
    FrameError,
    HostNotInstalled,
    LaraArgumentError,
    LatentActionConfig,
    LatentActionModel,
    attach_lara,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "openpi_posttrain.py"
without_openpi = pytest.mark.skipif(importlib.util.find_spec("openpi") is not None, reason="openpi is installed here")


# ---------------------------------------------------------------------- the transform


class Inputs:
    """As openpi's: a fixed dict from fixed keys."""

    def __call__(self, item):
        assert set(item) == {"front", "wrist", "state", "actions_is_pad"}
        assert item["front"].ndim == 3
        return {"image": {"base_0_rgb": item["front"]}, "state": item["state"]}


def item_of(valid=True, dtype=torch.float32):
    pair = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    if dtype != torch.uint8:
        pair = pair / 255
    return {"front": pair, "front_is_pad": torch.tensor([False, not valid]), "wrist": torch.zeros(3, 6, 8),
            "state": torch.ones(2), "actions_is_pad": torch.zeros(4, dtype=torch.bool)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("valid", [True, False])
def test_the_inner_transforms_see_a_stock_item_and_the_pair_comes_out(dtype, valid):
    keep = pickle.loads(pickle.dumps(KeepFrames(("front",), 6, (Inputs(),))))  # for spawned workers
    item = item_of(valid, dtype)
    before = dict(item)
    out = keep(item)
    assert item == before  # the caller's item is left alone
    assert out["image"]["base_0_rgb"] is item["front"] or torch.equal(out["image"]["base_0_rgb"], item["front"][0])
    assert out["lara_frames"].shape == (2, 3, 6, 6)
    assert out["lara_frames"].dtype == np.uint8
    assert bool(out["lara_frames_valid"]) is valid
    assert "lara_frames" not in out["image"]


def test_frames_of_the_wanted_size_are_exact_and_cameras_are_stacked():
    item = item_of()
    square = item["front"][..., :6]
    item |= {"front": square, "side": 1 - square, "side_is_pad": torch.tensor([False, True])}
    out = KeepFrames(("front", "side"), 6, ())(item)
    assert np.array_equal(out["lara_frames"][0], (square * 255).round().to(torch.uint8).numpy())
    assert np.array_equal(out["lara_frames"][1], 255 - out["lara_frames"][0])
    assert not out["lara_frames_valid"]  # one camera's future frame is past the end


def test_a_camera_without_a_pair_is_refused():
    with pytest.raises(FrameError, match=r"wrist has shape \[3, 6, 8\], but \[2, 3, H, W\]"):
        KeepFrames(("wrist",), 6, ())(item_of())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gap": 0}, "gap=0, but an integer >= 1"),
        ({"gap": True}, "gap=True"),
        ({"frame_size": None}, "frame_size=None"),
        ({"views": ["a", "a"]}, "different ones are expected"),
    ],
)
def test_a_plan_that_cannot_be(arguments, words):
    with pytest.raises(LaraArgumentError, match=words):
        FramePlan(**arguments)
    assert FramePlan("front").views == ("front",)


def test_the_pair_of_an_observation():
    frames, valid = torch.zeros(2, 2, 3, 4, 4, dtype=torch.uint8), torch.tensor([True, False])
    pair = observation_frames(SimpleNamespace(lara_frames=frames, lara_frames_valid=valid))
    assert list(pair.present.shape) == [2, 1, 3, 4, 4]
    assert torch.equal(pair.valid, valid)
    with pytest.raises(FrameError, match=r"SimpleNamespace carries no lara_frames; make the data loader"):
        observation_frames(SimpleNamespace())


def test_the_loader_has_what_openpis_has():
    loader = LaraDataLoader(SimpleNamespace(data_config=lambda: "config", set_epoch=print), FramePlan())
    assert loader.data_config() == "config"
    assert loader.set_epoch is print
    with pytest.raises(AttributeError):
        loader.nothing  # noqa: B018


# ---------------------------------------------------------------------- files


def attached(seed=0):
    torch.manual_seed(seed)
    policy = DitPolicy()
    return policy, attach_lara(policy, OwnLam(), -1)


def test_the_policys_file_has_nothing_of_lara_and_loads_into_both(tmp_path):
    policy, lara = attached()
    order = list(policy.state_dict())
    save_policy(lara, tmp_path / "model.safetensors")
    assert list(policy.state_dict()) == order
    assert load_file(tmp_path / "model.safetensors").keys() == DitPolicy().state_dict().keys()
    other, again = attached(1)
    kept = {key: value.clone() for key, value in again.state_dict().items()}
    load_policy(again, tmp_path / "model.safetensors")
    assert torch.equal(other.action_in.weight, policy.action_in.weight)
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    save_model(policy, str(tmp_path / "with.safetensors"))
    load_policy(again, tmp_path / "with.safetensors")
    assert all(torch.equal(value, lara.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_and_lara_stays_attached(tmp_path):
    policy, lara = attached()
    save_model(torch.nn.Linear(2, 2), str(tmp_path / "model.safetensors"))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_policy(lara, tmp_path / "model.safetensors")
    assert policy.lara is lara
    policy(make_batch(2))["loss"].backward()


def test_what_stands_in_for_safetensors_in_the_script(tmp_path, caplog):
    files = CheckpointFiles(tmp_path)
    plain = DitPolicy()
    (tmp_path / "1").mkdir()
    files.torch.save_model(plain, tmp_path / "1" / "model.safetensors")  # before LARA is attached: as ever
    files.torch.load_model(plain, tmp_path / "1" / "model.safetensors", device="cpu")
    torch.manual_seed(0)
    policy = DitPolicy()
    files.lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), -1)
    files.lara.step = 20
    files.plan = FramePlan(views=("image",), gap=10)
    (tmp_path / "20").mkdir()
    files.torch.save_model(policy, tmp_path / "20" / "model.safetensors")
    assert latest_checkpoint(tmp_path) == tmp_path / "20"
    assert (tmp_path / "20" / "lara" / "lara_config.json").is_file()
    assert not any("lara" in name for name in load_file(tmp_path / "20" / "model.safetensors"))
    weight = files.lara.projector[0].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    files.torch.load_model(policy, tmp_path / "20" / "model.safetensors", device="cpu")
    assert torch.equal(weight, kept)
    assert not caplog.messages
    files.plan = FramePlan(views=("image",), gap=5)
    files.torch.load_model(policy, tmp_path / "20" / "model.safetensors", device="cpu")
    assert "lara was saved with other frames than those of this run, in brackets: gap=10 (5)" in caplog.text
    caplog.clear()
    files.plan = None
    files.lara.detach()
    files.lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), -3)  # resumed with another layer
    files.torch.load_model(policy, tmp_path / "20" / "model.safetensors", device="cpu")
    said = "20/lara was saved with the state at transformer_blocks.4, but here it is read at transformer_blocks.2"
    assert said in caplog.text
    assert "other settings" not in caplog.text
    files.lara.detach()
    files.lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny()), -1, alignment="contrastive")
    files.torch.load_model(policy, tmp_path / "20" / "model.safetensors", device="cpu")
    assert "alignment={'name': 'cosine'} ({'name': 'contrastive'" in caplog.text
    with pytest.raises(AttachOrderError, match=r"1 was saved by a run without LARA"):
        files.torch.load_model(policy, tmp_path / "1" / "model.safetensors")
    # base weights, outside the run's folder, may be without
    CheckpointFiles(tmp_path / "other").torch.load_model(policy, tmp_path / "1" / "model.safetensors")


# ---------------------------------------------------------------------- without openpi


def test_the_defaults_are_the_papers_for_pi05():
    assert OpenpiLaraSettings().layer == -1
    with pytest.raises(LaraArgumentError, match=r"--lara\.lam"):
        OpenpiLaraSettings().build_lam()


def test_another_policy_is_refused():
    with pytest.raises(LaraArgumentError, match="policy is a DitPolicy, but openpi's PI0Pytorch is expected"):
        attach(DitPolicy(), OwnLam())


@without_openpi
@pytest.mark.parametrize(
    "call",
    [
        lambda: run(SimpleNamespace(), OpenpiLaraSettings(lam="x")),
        lambda: create_data_loader(SimpleNamespace()),
        find_training_script,
    ],
)
def test_it_says_which_wheels_and_which_repository(call):
    with pytest.raises(HostNotInstalled, match=r"github.com/Physical-Intelligence/openpi.*rlinf-openpi==0\.1\.1"):
        call()


@without_openpi
@pytest.mark.parametrize("arguments", [["--smoke"], ["pi05_libero"]])
def test_the_example_says_so_too_and_exits_with_2(arguments, tmp_path):
    pytest.importorskip("tyro")
    environment = {**os.environ, "LARA_SMOKE_DIR": str(tmp_path)}
    command = [sys.executable, str(EXAMPLE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "rlinf-openpi==0.1.1" in done.stderr
    assert "Traceback" not in done.stderr
