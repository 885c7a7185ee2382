"""`lara convert` on files in the authors' layouts, written here from our own mapping; the official code is not needed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import Backbone, published, small

from lara_adapter import AdapterFormatError, LaraArgumentError, LatentActionConfig, LatentActionModel
from lara_adapter.convert import config_to_official, convert_checkpoint, state_to_official
from lara_adapter.convert.frames import IMAGENET
from lara_adapter.convert.layouts import choose_encoder, parse, to_moto
from lara_adapter.convert.source import read_settings
from lara_adapter.saving.write import read_adapter
from lara_adapter.storage.files import read_json, read_tensors

ENCODER = "user/tiny"
PREFIX = "action_head.latent_motion_tokenizer."


def model(**changes):
    return small(image_encoder=ENCODER, **changes)


def official_parts(lam):
    return config_to_official(lam.config), state_to_official(lam.state_dict(), lam.config)


def write_official(folder, lam, moto=False):
    """The layout of the authors, written without `convert_checkpoint`."""
    settings, state = official_parts(lam)
    folder.mkdir(parents=True)
    if moto:
        yaml = pytest.importorskip("yaml")
        (folder / "config.yaml").write_text(yaml.safe_dump(to_moto(settings)))
        torch.save(state, folder / "pytorch_model.bin")
    else:
        (folder / "config.json").write_text(json.dumps(settings))
        save_file(state, folder / "model.safetensors")
    return folder


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def load(folder):
    return LatentActionModel.from_pretrained(folder, backbone=copy.deepcopy(BACKBONE))


torch.manual_seed(7)
BACKBONE = Backbone()


def frames():
    g = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 3, 32, 32, generator=g)


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("changes", [{}, {"fusion": "concat", "mask_token": True}], ids=str)
def test_official_to_ours_and_back_is_bit_identical(tmp_path, changes):
    lam = model(**changes)
    source = write_official(tmp_path / "official", lam)
    report = convert_checkpoint(source, tmp_path / "ours")
    assert load(tmp_path / "ours").config == lam.config
    assert same(load_file(tmp_path / "ours" / "model.safetensors"), dict(lam.state_dict()))
    convert_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert same(load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    written = {
        k: v
        for k, v in read_json(tmp_path / "back" / "config.json").items()
        if k not in ("architectures", "model_type")
    }
    assert written == read_json(source / "config.json")
    assert (report.source_layout, report.target_layout, report.prefix) == ("official", "lara_adapter", "")
    assert report.tensors == len(load_file(source / "model.safetensors"))
    assert report.frames_mean == (0.0, 0.0, 0.0)
    assert not report.frames_folded
    assert not report.dropped


def test_ours_to_official_and_back_is_bit_identical(tmp_path):
    lam = model()
    lam.save_pretrained(tmp_path / "ours")
    report = convert_checkpoint(tmp_path / "ours", tmp_path / "official")
    convert_checkpoint(tmp_path / "official", tmp_path / "back")
    assert read_json(tmp_path / "back" / "config.json") == read_json(tmp_path / "ours" / "config.json")
    assert same(load_file(tmp_path / "back" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors"))
    assert set(report.dropped) == {"quantizer.usage", "quantizer.step", "quantizer.ready"}


def test_moto_there_and_back_is_bit_identical(tmp_path):
    lam = model()
    source = write_official(tmp_path / "moto", lam, moto=True)
    report = convert_checkpoint(source, tmp_path / "ours", allow_pickle=True, frames="unit")
    assert report.source_layout == "moto"
    assert load(tmp_path / "ours").config == lam.config
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="moto")
    state = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert same(state, torch.load(source / "pytorch_model.bin", weights_only=True))
    assert read_settings(tmp_path / "back" / "config.yaml") == read_settings(source / "config.yaml")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == [
        "config.yaml",
        "conversion.json",
        "pytorch_model.bin",
    ]
    # between the two layouts of the authors nothing is rescaled, whatever the frames are
    convert_checkpoint(source, tmp_path / "official", to="official", allow_pickle=True)
    assert same(load_file(tmp_path / "official" / "model.safetensors"), state)
    assert convert_checkpoint(tmp_path / "official", tmp_path / "again").frames_mean == IMAGENET.mean


def test_the_codes_in_use_are_exported(tmp_path):
    lam = model(vq_warmup_steps=1).train()
    lam(*frames())
    assert lam.quantizer.offset.any()
    lam.save_pretrained(tmp_path / "ours")
    report = convert_checkpoint(tmp_path / "ours", tmp_path / "official")
    written = load_file(tmp_path / "official" / "model.safetensors")["vector_quantizer.embedding.weight"]
    assert torch.equal(written, lam.quantizer.indices_to_codes(torch.arange(10)))
    assert any("offset" in note for note in report.notes)
    assert "vq_warmup_steps" in report.dropped


def test_a_dtype_is_kept(tmp_path):
    lam = model().bfloat16()
    report = convert_checkpoint(write_official(tmp_path / "official", lam), tmp_path / "ours")
    assert report.dtypes == ["bfloat16"]
    assert read_tensors(tmp_path / "ours" / "model.safetensors")["inverse_dynamics.separator"].dtype == torch.bfloat16
    load(tmp_path / "ours")


# ---------------------------------------------------------------------- the range of the frames


def normalize(images):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return (images - mean) / std


@pytest.mark.parametrize("changes", [{}, {"fusion": "concat", "mask_token": True}], ids=str)
def test_imagenet_frames_give_the_same_latent_codes_and_picture(tmp_path, changes):
    """As is and given normalised frames, or folded and given frames in [0, 1]: one model."""
    source = write_official(tmp_path / "official", model(**changes))
    convert_checkpoint(source, tmp_path / "unit", frames="unit")
    report = convert_checkpoint(source, tmp_path / "folded", frames="imagenet")
    assert report.frames_folded
    assert (report.frames_mean, report.frames_std) == IMAGENET
    plain, folded = load(tmp_path / "unit"), load(tmp_path / "folded")
    assert (folded.config.image_mean, folded.config.image_std) == IMAGENET
    with torch.no_grad():
        theirs, ours = plain(*map(normalize, frames())), folded(*frames())
    torch.testing.assert_close(ours.latent.continuous, theirs.latent.continuous, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.latent.indices, theirs.latent.indices)
    torch.testing.assert_close(normalize(ours.reconstruction), theirs.reconstruction, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours.codebook_loss, theirs.codebook_loss, rtol=1e-5, atol=1e-5)
    # and it matters: the weights as they are, given [0, 1], are another model
    assert not torch.allclose(plain(*frames()).latent.continuous, theirs.latent.continuous, atol=1e-2)


def test_normalised_frames_survive_the_way_back(tmp_path):
    source = write_official(tmp_path / "official", model())
    convert_checkpoint(source, tmp_path / "folded", frames="imagenet")
    report = convert_checkpoint(tmp_path / "folded", tmp_path / "back")
    assert report.frames_folded
    one, other = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    again = convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert (again.frames_mean, again.frames_std) == IMAGENET
    assert "conversion.json" in again.frames_reason


def test_which_frames_are_assumed(tmp_path):
    lam = model()
    alone = write_official(tmp_path / "alone", lam)
    assert convert_checkpoint(alone, tmp_path / "1").frames_reason.startswith("a tokenizer alone")
    inside = write_official(tmp_path / "policy" / "latent_motion_tokenizer", lam)
    assert convert_checkpoint(inside, tmp_path / "2").frames_std == (1.0, 1.0, 1.0)  # no policy around it
    (tmp_path / "policy" / "config.json").write_text(json.dumps({"action_head_cfg": {}}))
    assert convert_checkpoint(inside, tmp_path / "3").frames_std == IMAGENET.std
    asked = convert_checkpoint(inside, tmp_path / "4", frames="unit")
    assert asked.frames_reason == "as requested"
    report = convert_checkpoint(write_official(tmp_path / "moto", lam, moto=True), tmp_path / "5", allow_pickle=True)
    assert report.frames_std == pytest.approx([0.229, 0.224, 0.225], abs=2e-6)
    assert report.frames_std != IMAGENET.std  # their preprocessor adds 1e-6
    with pytest.raises(LaraArgumentError, match="image_mean"):
        convert_checkpoint(tmp_path / "1", tmp_path / "6", frames="unit")


# ---------------------------------------------------------------------- settings


def test_settings_as_yaml_nested_as_hydra_writes_them(tmp_path):
    yaml = pytest.importorskip("yaml")
    lam = model()
    source = write_official(tmp_path / "official", lam)
    settings = read_json(source / "config.json")
    (source / "config.json").unlink()
    settings["image_encoder_config"] |= {"_recursive_": True, "from_tf": False}
    target = "moto.latent_motion_tokenizer.model.latent_motion_tokenizer.LatentMotionTokenizer"
    inner = {
        "_target_": "moto.latent_motion_tokenizer.configs.LatentMotionTokenizerConfig",
        "_recursive_": False,
        **settings,
    }
    text = yaml.safe_dump({"_target_": target, "_recursive_": True, "config": inner})
    # the release writes 1e-12, which YAML 1.1 reads as a string
    assert "1.0e-12" in text
    (source / "config.yaml").write_text(text.replace("1.0e-12", "1e-12"))
    convert_checkpoint(source, tmp_path / "ours")
    assert load(tmp_path / "ours").config == lam.config


def test_the_published_settings_of_both(tmp_path):
    settings = published() | {
        "use_abs_recons_loss": False,
        "recon_hidden_loss_w": 1.0,
        "hidden_state_decoder_config": None,
    }
    settings.pop("_target_")
    label = "transformers.ViTMAEModel.from_pretrained"
    settings["image_encoder_config"] = {
        "_target_": label,
        "pretrained_model_name_or_path": "${oc.env:LARA_VIT_MAE_PATH}",
    }
    found = parse(settings, tmp_path)
    assert found.layout == "official"
    assert set(found.dropped) == {"use_abs_recons_loss", "recon_hidden_loss_w"}
    assert choose_encoder(found, 1024, tmp_path)[0] == "facebook/vit-mae-large"
    moto = to_moto(config_to_official(LatentActionConfig.paper()))
    assert sorted(moto) == [
        "_target_", "codebook_dim", "commit_loss_w", "decoder", "image_encoder", "m_former", "perceptual_loss_w",
        "recon_loss_w", "vector_quantizer",
    ]  # fmt: skip
    found = parse(moto, tmp_path)
    assert (found.layout, found.image_encoder) == ("moto", "facebook/vit-mae-large")
    with pytest.raises(AdapterFormatError, match="--image-encoder"):
        choose_encoder(found._replace(image_encoder="/somebody/elses/folder"), 20, tmp_path)


def put(values, path, value):
    *parents, last = path.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize("layout", ["official", "moto"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("m_former.config.is_diff_image", True),
        ("decoder.config.norm_first", False),
        ("vector_quantizer.decay", 0.99),
        ("auto_map", {"AutoModel": "code.Model"}),
        ("hidden_state_decoder", {"config": {}}),
        ("image_encoder.from_tf", True),
        ("decoder", ["a", "list"]),
        ("m_former.config.hidden_act", "relu"),
        ("vector_quantizer.remap", "used.npy"),
        ("m_former.config.num_hidden_layers", None),
        ("recon_loss_w", 0.5),
    ],
)
def test_settings_that_cannot_be_expressed_are_refused_by_file_and_key(tmp_path, layout, path, value):
    pytest.importorskip("yaml")
    source = write_official(tmp_path / "in", model(), moto=layout == "moto")
    file = source / ("config.yaml" if layout == "moto" else "config.json")
    settings = read_settings(file)
    part, dot, rest = path.partition(".")
    if layout == "official" and part in {key.removesuffix("_config") for key in settings} | {"hidden_state_decoder"}:
        part += "_config" if f"{part}_config" in settings or part == "hidden_state_decoder" else ""
    path = part + dot + rest
    put(settings, path, value)
    file.write_text(json.dumps(settings))
    with pytest.raises(AdapterFormatError, match=path) as caught:
        convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    assert str(file) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_an_unknown_setting_can_be_passed_over_by_name(tmp_path):
    source = write_official(tmp_path / "in", model())
    settings = read_json(source / "config.json")
    settings["m_former_config"]["config"]["note"] = "mine"
    (source / "config.json").write_text(json.dumps(settings))
    name = "m_former_config.config.note"
    with pytest.raises(AdapterFormatError, match=rf"{name}.*--ignore-settings"):
        convert_checkpoint(source, tmp_path / "out")
    report = convert_checkpoint(source, tmp_path / "out", ignore_settings=[name])
    assert report.dropped == {name: "'mine', ignored as requested"}
    for wrong in ("nothing", "m_former_config.config.hidden_size"):
        with pytest.raises(LaraArgumentError, match=wrong):
            convert_checkpoint(source, tmp_path / "out", ignore_settings=[name, wrong])


def test_the_absolute_error_matters_in_moto_only(tmp_path):
    settings = config_to_official(LatentActionConfig.paper()) | {"use_abs_recons_loss": True}
    assert "use_abs_recons_loss" in parse(settings, tmp_path).dropped
    with pytest.raises(AdapterFormatError, match="use_abs_recons_loss"):
        parse(to_moto(settings), tmp_path)


@pytest.mark.parametrize(
    "where", ["", "image_encoder", "m_former", "m_former.config", "vector_quantizer", "decoder.config.x"]
)
@pytest.mark.parametrize("moto", [False, True])
def test_a_foreign_class_is_refused_and_nothing_is_imported(tmp_path, monkeypatch, where, moto):
    (tmp_path / "canary.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'sung')!r}).touch()\nModel = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = write_official(tmp_path / "in", model(), moto=moto)
    file = source / ("config.yaml" if moto else "config.json")
    settings = read_settings(file)
    part, dot, rest = where.partition(".")
    path = f"{part}{'' if moto or not part else '_config'}{dot}{rest}"
    if rest.endswith("x"):
        put(settings, path, {})
    put(settings, f"{path}._target_" if path else "_target_", "canary.Model")
    file.write_text(json.dumps(settings))
    before = set(sys.modules)
    with pytest.raises(AdapterFormatError, match=r"canary\.Model.*nothing was imported") as caught:
        convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    assert f": {path}._target_".replace(": .", ": ") in str(caught.value)
    assert not (tmp_path / "sung").exists()
    assert "canary" not in set(sys.modules) - before
    assert not (tmp_path / "out").exists()


def test_a_yaml_tag_runs_nothing(tmp_path):
    pytest.importorskip("yaml")
    source = write_official(tmp_path / "in", model(), moto=True)
    (source / "config.yaml").write_text(f"m_former: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']\n")
    with pytest.raises(AdapterFormatError, match=r"config\.yaml is not readable YAML"):
        convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a list", "list"), ("a: [", "not readable"), ("", "NoneType"), ("a: 1", "neither m_former_config")],
)
def test_what_is_no_settings_file(tmp_path, text, message):
    pytest.importorskip("yaml")
    source = write_official(tmp_path / "in", model())
    (source / "config.yaml").write_text(text)
    with pytest.raises(AdapterFormatError, match=rf"config\.yaml.*{message}"):
        convert_checkpoint(source, tmp_path / "out")


def test_yaml_without_pyyaml(tmp_path, monkeypatch):
    source = write_official(tmp_path / "in", model())
    (source / "config.json").rename(source / "config.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(AdapterFormatError, match="pip install pyyaml"):
        convert_checkpoint(source, tmp_path / "out")


def test_settings_that_stand_elsewhere(tmp_path):
    source = write_official(tmp_path / "in", model())
    (source / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(AdapterFormatError, match="--settings"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", settings=tmp_path / "elsewhere.json")
    assert load(tmp_path / "out").config == model().config


# ---------------------------------------------------------------------- weights

NAME = "decoder.transformer.encoder.layer.0.attention.attention.value.weight"


def damage(**changes):
    """Replace tensors of the official file; None takes one away."""

    def apply(source):
        state = load_file(source / "model.safetensors") | changes
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, source / "model.safetensors")

    return apply


def rewrite(change):
    return lambda source: (source / "model.safetensors").write_bytes(
        change((source / "model.safetensors").read_bytes())
    )


DAMAGE = {
    "missing": (damage(**{NAME: None}), rf"1 tensors missing .*{NAME}"),
    "unknown": (
        damage(**{"m_former.pooler.dense.weight": torch.ones(2)}),
        r"1 unknown .*m_former\.pooler\.dense\.weight",
    ),
    "shape": (damage(**{NAME: torch.ones(3, 3)}), rf"{NAME} has shape \[3, 3\]"),
    "nan": (damage(**{NAME: torch.full((16, 16), float("nan"))}), rf"{NAME} holds NaN"),
    "integers": (damage(**{NAME: torch.ones(16, 16, dtype=torch.int64)}), rf"{NAME} is torch\.int64"),
    "two codebooks": (damage(**{"x.vector_quantizer.embedding.weight": torch.ones(2)}), "2 latent action models"),
    "none": (damage(**{"vector_quantizer.embedding.weight": None}), r"no vector_quantizer\.embedding\.weight"),
    "truncated": (rewrite(lambda data: data[:-50]), "truncated"),
    "empty": (rewrite(lambda data: b""), "truncated"),
    "pickle": (rewrite(lambda data: pickle.dumps({})), "pickle"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_refused_by_file_and_key(tmp_path, kind):
    source = write_official(tmp_path / "in", model())
    change, message = DAMAGE[kind]
    change(source)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        convert_checkpoint(source, tmp_path / "deep" / "out")
    assert str(source / "model.safetensors") in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_no_weights_at_all(tmp_path):
    source = write_official(tmp_path / "in", model())
    (source / "model.safetensors").rename(source / "other.pt")
    with pytest.raises(AdapterFormatError, match=r"none of model\.safetensors.*other\.pt"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"residual": True},
        {"normalize_latent": True},
        {"reconstruction_over_copy": True},
        {"encoder_image_size": 64, "encoder_patch_size": 16},
        {"vq_warmup_steps": 5},
    ],
    ids=str,
)
def test_a_model_of_ours_that_theirs_cannot_be(tmp_path, change):
    model(**({} if "encoder_image_size" in change else change)).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**read_json(path), **change}))
    named = {"vq_warmup_steps": r"quantizer\.ready"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(AdapterFormatError, match=rf"{tmp_path / 'in'}.*{named}"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("kind", ["missing", "nan", "counter", "truncated"])
def test_damaged_weights_of_ours(tmp_path, kind):
    model().save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    state, data = load_file(file), file.read_bytes()
    name = "quantizer.ready" if kind == "counter" else "inverse_dynamics.separator"
    state[name] = torch.ones(2, dtype=torch.int64) if kind == "counter" else torch.full_like(state[name], float("nan"))
    save_file({k: v for k, v in state.items() if kind != "missing" or k != name}, file)
    if kind == "truncated":
        file.write_bytes(data[:-9])
    with pytest.raises(AdapterFormatError, match=kind if kind == "truncated" else name) as caught:
        convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert str(file) in str(caught.value)


# ---------------------------------------------------------------------- pickles


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_needs_the_flag_and_never_runs_code(tmp_path, monkeypatch):
    source = write_official(tmp_path / "in", model(), moto=True)
    with pytest.raises(AdapterFormatError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle"):
        convert_checkpoint(source, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.1+cpu")
        with pytest.raises(AdapterFormatError, match=r"torch 2\.5\.1.*torch >= 2\.6"):
            convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    good = torch.load(source / "pytorch_model.bin", weights_only=True)
    for content, message in (
        ({**good, "x": Hostile(str(tmp_path / "executed"))}, "more than tensors"),
        ([1, 2], "holds a list"),
        ({**good, "epoch": 3}, "'epoch' is a int"),
    ):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(AdapterFormatError, match=rf"pytorch_model\.bin.*{message}"):
            convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(AdapterFormatError, match="truncated"):
        convert_checkpoint(source, tmp_path / "out", allow_pickle=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_safetensors_come_before_a_pickle(tmp_path):
    source = write_official(tmp_path / "in", model())
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    assert list(convert_checkpoint(source, tmp_path / "out").read) == ["config.json", "model.safetensors"]
    with pytest.raises(AdapterFormatError, match="is a pickle"):
        convert_checkpoint(source / "pytorch_model.bin", tmp_path / "other")


# ---------------------------------------------------------------------- shards, and a policy's checkpoint


def write_shards(folder, state, name="model-{:05d}-of-00002.safetensors"):
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({k: state[k].contiguous() for k in part}, folder / name.format(number + 1))
        weight_map |= dict.fromkeys(part, name.format(number + 1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.fixture
def sharded(tmp_path):
    source = write_official(tmp_path / "in", model())
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    return source, write_shards(source, state)


def test_shards(sharded, tmp_path):
    source, _ = sharded
    report = convert_checkpoint(source, tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), dict(model().state_dict()))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert list(report.read) == ["config.json", "model.safetensors.index.json", *shards]
    assert all(len(sha) == 64 for sha in report.read.values())


@pytest.mark.parametrize("kind", ["missing shard", "wrong shard", "unlisted", "outside", "no map"])
def test_shards_that_are_not_what_the_index_says(sharded, tmp_path, kind):
    source, weight_map = sharded
    index = source / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    if kind == "missing shard":
        (source / first).unlink()
    elif kind == "wrong shard":
        weight_map[NAME] = next(shard for shard in set(weight_map.values()) if shard != weight_map[NAME])
    elif kind == "unlisted":
        weight_map.pop(NAME)
    elif kind == "outside":
        weight_map[NAME] = "../in/" + weight_map[NAME]
    index.write_text(json.dumps({} if kind == "no map" else {"weight_map": weight_map}))
    message = {"missing shard": f"{first} is missing", "outside": r"'\.\./in/", "no map": "weight_map"}.get(kind, NAME)
    with pytest.raises(AdapterFormatError, match=message):
        convert_checkpoint(source, tmp_path / "out")


@pytest.fixture
def policy(tmp_path):
    """The layout of the official joint training: a sharded policy with the tokenizer inside and its settings below."""
    lam = model()
    settings, state = official_parts(lam)
    g = torch.Generator().manual_seed(1)
    whole = {PREFIX + name: tensor for name, tensor in state.items()}
    whole |= {f"action_head.model.transformer_blocks.{n}.norm.weight": torch.rand(6, generator=g) for n in range(5)}
    whole["action_head.pred_latent_motion_head.weight"] = torch.rand(12, 6, generator=g)
    whole["action_head.pred_latent_motion_head.bias"] = torch.rand(12, generator=g)
    whole["backbone.weight"] = torch.full((3,), float("nan"))  # none of our business
    folder = tmp_path / "policy"
    (folder / "latent_motion_tokenizer").mkdir(parents=True)
    (folder / "latent_motion_tokenizer" / "config.json").write_text(json.dumps(settings))
    head = {"latent_motion_hidden_layer": -3, "latent_loss_weight": 0.02, "tune_latent_motion_tokenizer": True}
    (folder / "config.json").write_text(json.dumps({"architectures": ["SomePolicy"], "action_head_cfg": head}))
    write_shards(folder, whole)
    return folder, lam, whole


def test_the_latent_action_model_out_of_a_policy(policy, tmp_path):
    folder, lam, _ = policy
    report = convert_checkpoint(folder, tmp_path / "out", frames="unit")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), dict(lam.state_dict()))
    assert report.prefix == PREFIX
    assert report.dropped["the rest of the policy"].startswith("6 tensors")
    assert any("pred_latent_motion_head.weight" in note and "--adapter" in note for note in report.notes)
    assert convert_checkpoint(folder, tmp_path / "folded").frames_std == IMAGENET.std


def test_projector_and_latent_action_model_as_an_adapter(policy, tmp_path):
    folder, lam, whole = policy
    drawn = torch.get_rng_state()
    report = convert_checkpoint(folder, tmp_path / "out", frames="unit", adapter=True)
    assert torch.equal(torch.get_rng_state(), drawn)
    saved = read_adapter(tmp_path / "out")
    assert torch.equal(saved.tensors["projector.weight"], whole["action_head.pred_latent_motion_head.weight"])
    assert torch.equal(saved.tensors["projector.bias"], whole["action_head.pred_latent_motion_head.bias"])
    config = saved.config
    assert (config.layer, config.depth, config.blocks) == (3, 5, "action_head.model.transformer_blocks")
    assert (config.tap, config.token, config.projector) == ("action_head.model.transformer_blocks.2", "last", "linear")
    assert (config.align_weight, config.lam_weight, config.hidden_width, config.latent_width) == (0.02, 0.01, 6, 12)
    assert config.policy_class == "SomePolicy"
    assert same(dict(load(tmp_path / "out" / "lam").state_dict()), dict(lam.state_dict()))
    assert set(report.written) == {
        "README.md", "lam/config.json", "lam/model.safetensors", "lara_adapter.safetensors", "lara_config.json"
    }  # fmt: skip
    convert_checkpoint(folder, tmp_path / "out", adapter=True)  # over an earlier one


@pytest.mark.parametrize("kind", ["no projector", "no blocks", "layer", "width"])
def test_a_projector_that_is_not_there_or_does_not_fit(policy, tmp_path, kind):
    folder, _, whole = policy
    head = "action_head.pred_latent_motion_head.weight"
    if kind == "layer":
        (folder / "config.json").write_text(json.dumps({"action_head_cfg": {"latent_motion_hidden_layer": -9}}))
    elif kind == "width":
        write_shards(folder, {**whole, head: torch.ones(10, 6)})
    else:
        lost = head if kind == "no projector" else "action_head.model"
        write_shards(folder, {k: v for k, v in whole.items() if not k.startswith(lost)})
    message = {"layer": "latent_motion_hidden_layer=-9", "width": r"\[10, 6\]"}.get(kind, "has no projector")
    with pytest.raises(AdapterFormatError, match=message):
        convert_checkpoint(folder, tmp_path / "out", adapter=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy"]


def test_frozen_networks_in_the_state_are_left_out_and_said(tmp_path):
    source = write_official(tmp_path / "in", model())
    damage(**{"image_encoder.x": torch.ones(2), "image_encoder.y": torch.ones(2), "loss_fn_lpips.z": torch.ones(1)})(
        source
    )
    dropped = convert_checkpoint(source, tmp_path / "out").dropped
    assert {name: why[:9] for name, why in dropped.items()} == {
        "image_encoder.*": "2 tensors",
        "loss_fn_lpips.*": "1 tensors",
    }


def test_the_prefix_of_a_wrapped_model(tmp_path):
    source = write_official(tmp_path / "in", model())
    state = load_file(source / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, source / "model.safetensors")
    report = convert_checkpoint(source, tmp_path / "out")
    assert report.prefix == "module."
    assert report.frames_std == (1.0, 1.0, 1.0)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), dict(model().state_dict()))


# ---------------------------------------------------------------------- source and destination


def test_a_destination_that_holds_something_else_is_left_alone(tmp_path):
    source = write_official(tmp_path / "in", model())
    target = tmp_path / "out"
    target.mkdir()
    convert_checkpoint(source, target)  # empty
    convert_checkpoint(source, target, frames="imagenet")  # an earlier conversion
    assert read_json(target / "conversion.json")["frames_folded"] is True
    kept = {p.name: p.read_bytes() for p in target.iterdir()}
    (target / "notes.txt").write_text("mine")
    with pytest.raises(LaraArgumentError, match=r"notes\.txt"):
        convert_checkpoint(source, target)
    (target / "notes.txt").unlink()
    assert {p.name: p.read_bytes() for p in target.iterdir()} == kept
    load(target).save_pretrained(target)
    convert_checkpoint(source, target)  # the same bytes
    lam = load(target)
    with torch.no_grad():
        lam.inverse_dynamics.separator.add_(1)
    lam.save_pretrained(target)
    with pytest.raises(LaraArgumentError, match=r"model\.safetensors.*changed since"):
        convert_checkpoint(source, target)
    with pytest.raises(LaraArgumentError, match="is a file"):
        convert_checkpoint(source, target / "config.json")
    with pytest.raises(LaraArgumentError, match=r"holds|is the source"):
        convert_checkpoint(source, source)
    elsewhere = tmp_path / "theirs"
    elsewhere.mkdir()
    (elsewhere / "a").touch()
    with pytest.raises(LaraArgumentError, match="which no earlier conversion wrote"):
        convert_checkpoint(source, elsewhere)


def test_a_failed_conversion_leaves_the_earlier_one(tmp_path):
    source = write_official(tmp_path / "in", model())
    convert_checkpoint(source, tmp_path / "out")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    damage(**{NAME: None})(source)
    with pytest.raises(AdapterFormatError):
        convert_checkpoint(source, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_what_makes_no_sense_is_refused(tmp_path):
    source = write_official(tmp_path / "in", model())
    for arguments, message in (
        ({"to": "official"}, "already"),
        ({"to": "onnx"}, "to='onnx'"),
        ({"frames": "bgr"}, "frames='bgr'"),
        ({"adapter": True}, "policy's checkpoint"),
        ({"subfolder": "../elsewhere"}, "subfolder"),
        ({"image_encoder": ""}, "image_encoder"),
    ):
        with pytest.raises(LaraArgumentError, match=message):
            convert_checkpoint(source, tmp_path / "out", **arguments)
    with pytest.raises(LaraArgumentError, match="is a file"):
        convert_checkpoint(source / "model.safetensors", tmp_path / "out", subfolder="a")
    with pytest.raises(AdapterFormatError, match="has no folder 'lam'"):
        convert_checkpoint(source, tmp_path / "out", subfolder="lam")
    with pytest.raises(AdapterFormatError, match="does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_and_a_subfolder_as_source(tmp_path):
    write_official(tmp_path / "in" / "latent_motion_tokenizer", model())
    report = convert_checkpoint(tmp_path / "in", tmp_path / "1", subfolder="latent_motion_tokenizer")
    assert report.source.endswith("in/latent_motion_tokenizer")
    convert_checkpoint(
        tmp_path / "in" / "latent_motion_tokenizer" / "model.safetensors", tmp_path / "2", image_encoder="a/b"
    )
    assert read_json(tmp_path / "2" / "config.json")["image_encoder"] == "a/b"


def test_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "snapshots" / commit
    write_official(snapshot / "latent_motion_tokenizer", model())
    (snapshot / "config.json").write_text(json.dumps({"action_head_cfg": {}}))
    asked = {}

    def download(repo, revision=None, allow_patterns=None, **ignored):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    report = convert_checkpoint("someone/joint", tmp_path / "out", subfolder="latent_motion_tokenizer", revision="main")
    assert (asked["repo"], asked["revision"], report.revision) == ("someone/joint", "main", commit)
    assert "latent_motion_tokenizer/*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith("bin") or pattern == "*.safetensors" for pattern in asked["patterns"])
    assert report.frames_std == IMAGENET.std


# ---------------------------------------------------------------------- the command


@pytest.fixture
def lara():
    pytest.importorskip("tyro")
    from lara_adapter.cli import main

    return main


def test_the_command(lara, tmp_path, capsys):
    source = write_official(tmp_path / "in", model())
    assert lara(["convert", str(source), str(tmp_path / "ours")]) == 0
    text = capsys.readouterr().out
    for part in ("official", "74 tensors", "frames", "patch order", "user/tiny"):
        assert part in text
    assert lara(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "official", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target_layout"] == "official"
    assert same(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))


def test_the_command_refuses_in_one_line(lara, tmp_path, capsys):
    source = write_official(tmp_path / "in", model(), moto=True)
    assert lara(["convert", str(source), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "--allow-pickle" in captured.err
    options = ["--allow-pickle", "--image-encoder", "me/mae"]
    assert lara(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    assert read_json(tmp_path / "out" / "config.json")["image_encoder"] == "me/mae"
