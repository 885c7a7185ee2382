"""Configuration and files of a latent action model: round trips, and everything that is not one."""

from __future__ import annotations

import json

import pytest
import torch
from test_model import frames, small

from lara_adapter import AdapterFormatError, HubError, LaraArgumentError, LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import read_tensors, write_tensors


@pytest.fixture
def saved(tmp_path):
    lam = small(vq_warmup_steps=1).train()
    lam(*frames())
    lam.save_pretrained(tmp_path / "lam")
    return lam.eval(), tmp_path / "lam"


def test_round_trip_is_bit_exact(saved):
    lam, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    again = LatentActionModel.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == lam.config
    assert torch.equal(again(*frames()).loss, lam(*frames()).loss)
    assert again.state_dict().keys() == lam.state_dict().keys()
    assert all(torch.equal(v, lam.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("preset", ["paper", "tiny"])
def test_presets_survive_json(preset):
    config = getattr(LatentActionConfig, preset)()
    assert LatentActionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_papers_sizes():
    config = LatentActionConfig.paper()
    assert (config.image_encoder, config.image_size, config.encoder_width) == ("facebook/vit-mae-large", 224, 1024)
    assert (config.idm_layers, config.idm_width, config.idm_heads, config.idm_mlp) == (4, 768, 12, 3072)
    assert (config.queries, config.latent_dim, config.codebook_size, config.commitment_weight) == (8, 32, 128, 0.25)
    assert (config.fdm_layers, config.fdm_width, config.fdm_heads, config.fusion) == (12, 768, 12, "add")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_keys_are_ignored_with_a_warning_and_never_interpreted(saved, caplog, tmp_path):
    _, folder = saved
    edit(folder, _target_="os.mkdir", path=str(tmp_path / "executed"))
    LatentActionModel.from_pretrained(folder)
    assert "_target_" in caplog.text
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "99"),
        ({"schema_version": None}, "schema_version|format"),
        ({"format": "something.else"}, "something.else"),
        ({"queries": -1}, "queries"),
        ({"queries": "8"}, "queries"),
        ({"fusion": "exec"}, "fusion"),
        ({"codebook_size": 32}, "shape"),
    ],
)
def test_foreign_or_newer_configurations(saved, changes, message):
    _, folder = saved
    edit(folder, **changes)
    with pytest.raises((AdapterFormatError, LaraArgumentError), match=message):
        LatentActionModel.from_pretrained(folder)


def test_damaged_weights(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    good = path.read_bytes()
    tensors = read_tensors(path)
    name = next(n for n, t in tensors.items() if t.is_floating_point() and t.ndim == 2)
    for change, message in (
        (lambda: path.write_bytes(good[:-50]), "truncated"),
        (path.unlink, "missing"),
        (lambda: write_tensors(path, {k: v for k, v in tensors.items() if k != name}), "1 tensors missing"),
        (lambda: write_tensors(path, {**tensors, "x": torch.zeros(1)}), "1 unexpected"),
        (lambda: write_tensors(path, {**tensors, name: torch.full_like(tensors[name], float("nan"))}), "NaN"),
        (lambda: write_tensors(path, {**tensors, name: tensors[name][:1]}), "shape"),
    ):
        path.write_bytes(good)
        change()
        with pytest.raises(AdapterFormatError, match=message):
            LatentActionModel.from_pretrained(folder)


def test_a_folder_of_pickles_is_refused(saved):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(AdapterFormatError, match=r"model\.safetensors is missing.*pytorch_model\.bin"):
        LatentActionModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("/nowhere/lam", AdapterFormatError, "does not exist"),
        ("./nowhere", AdapterFormatError, "does not exist"),
        ("no where", AdapterFormatError, "nor a Hub id"),
        ("nobody/nothing", HubError, "the Hub is not asked"),
    ],
)
def test_a_missing_source_is_named(where, error, message):
    with pytest.raises(error, match=message):
        LatentActionModel.from_pretrained(where)


@pytest.mark.parametrize(
    "change",
    [{"image_size": 0}, {"idm_heads": 5}, {"fdm_patch_size": 9}, {"vq_usage_decay": 1.0}, {"image_std": (0, 1, 1)}],
)
def test_values_are_checked_by_name(change):
    with pytest.raises(LaraArgumentError, match=next(iter(change))):
        LatentActionConfig(**change)
