"""`lara convert` against the authors' code: their classes, saved by their code, converted from disk, compared, and back.

LARA_OFFICIAL_SRC: checkout of LARA_full; LARA_MOTO_SRC: checkout of TencentARC/Moto. Sizes are tiny and weights random;
LPIPS is the stand-in of benchmarks/parity/sides.py on both sides (its VGG weights are a download).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.checkout import add_checkout
from benchmarks.parity import official as parity
from benchmarks.parity import sides
from lara_adapter import FramePair, LatentActionModel, load_lara
from lara_adapter.convert import convert_checkpoint
from lara_adapter.convert import state as mapping
from lara_adapter.storage.files import read_tensors

logger = logging.getLogger(__name__)

LARA, MOTO = os.environ.get("LARA_OFFICIAL_SRC"), os.environ.get("LARA_MOTO_SRC")
TOLERANCE = 1e-5
SIZE, PATCH = sides.IMAGE, sides.PATCH

needs_lara = pytest.mark.skipif(
    not LARA, reason="set LARA_OFFICIAL_SRC to a checkout of LARA_full (github.com/lmy1001/LARA)"
)
needs_moto = pytest.mark.skipif(not MOTO, reason="set LARA_MOTO_SRC to a checkout of Moto (github.com/TencentARC/Moto)")
pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------- the authors' models


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny ViT-MAE on disk: the image encoder that settings name."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    settings = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=SIZE,
        patch_size=PATCH, decoder_num_hidden_layers=1, decoder_hidden_size=16, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    model = transformers.ViTMAEModel(settings)
    sides.randomize(model, 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def perceptual(monkeypatch):
    """LPIPS without a download, wherever the authors build it."""
    lpips = pytest.importorskip("lpips")
    real = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda net: sides.perceptual_stand_in(real, kinks=True))


def shrink(part, encoder):
    """Make the published settings tiny; everything else in them stays as it was published."""
    former, decoder = part("m_former").config, part("decoder").config
    former.update(query_num=4, input_hidden_size=32, num_patches=17, hidden_size=48, intermediate_size=96,
                  num_attention_heads=4, num_hidden_layers=2)  # fmt: skip
    decoder.update(query_num=4, hidden_size=40, intermediate_size=80, num_attention_heads=4, num_hidden_layers=2,
                   image_size=SIZE, num_patches=(SIZE // PATCH) ** 2)  # fmt: skip
    part("vector_quantizer").update(n_e=64, e_dim=8)
    part("image_encoder").pretrained_model_name_or_path = str(encoder)


def lara_tokenizer(encoder, **changes):
    """The tokenizer of LARA_full, by its own class, from its published settings."""
    official = sides.import_official(Path(LARA).resolve())
    import hydra
    from omegaconf import OmegaConf

    (path,) = (official.source / "moto" / "configs" / "model").glob("*.yaml")
    settings = OmegaConf.load(path)
    shrink(lambda name: settings.config[f"{name}_config"], encoder)
    settings.config.codebook_dim = 8
    for key, value in changes.items():
        OmegaConf.update(settings, f"config.{key.replace('/', '_config.')}", value, force_add=True)
    return fill(hydra.utils.instantiate(settings))


def moto_tokenizer(encoder, **changes):
    """Moto's tokenizer, by its own class, from its published settings; `config` as its training program sets it."""
    add_checkout(MOTO, "Moto", contains="latent_motion_tokenizer")
    import hydra
    from omegaconf import OmegaConf

    path = Path(MOTO) / "latent_motion_tokenizer/checkpoints/latent_motion_tokenizer_trained_on_oxe/config.yaml"
    settings = OmegaConf.load(path)
    shrink(lambda name: settings[name], encoder)
    settings.codebook_dim = 8
    for key, value in changes.items():
        OmegaConf.update(settings, key.replace("/", "."), value, force_add=True)
    model = fill(hydra.utils.instantiate(settings))
    model.config = settings
    return model


@torch.no_grad()
def fill(tokenizer):
    """Random weights under which every part matters, and codes near real latents."""
    for part in ("m_former", "vector_quantizer", "vq_down_resampler", "vq_up_resampler", "decoder"):
        sides.randomize(getattr(tokenizer, part), 2)
    sides.set_patch_order(tokenizer.image_encoder)  # THE SWITCH of benchmarks/parity/sides.py, for the whole test
    seen = {}
    handle = tokenizer.vq_down_resampler.register_forward_hook(lambda m, a, out: seen.update(z=out))
    frames = batch(9, 16)
    tokenizer(frames[:, 0], frames[:, 1])
    handle.remove()
    codes, z = tokenizer.vector_quantizer.embedding.weight, seen["z"].flatten(0, 1)
    codes.copy_(z[: len(codes)] + 0.2 * z.std() * torch.randn(codes.shape, generator=torch.Generator().manual_seed(4)))
    return tokenizer.eval()  # LPIPS has dropout


def batch(seed=0, count=6):
    return sides.make_batch(seed, torch.float32, count)["frames"]


def functions_of(path, *names):
    """Functions of a file whose imports are not all here, compiled from its source as it stands."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    import hydra
    import omegaconf

    space = {"os": os, "torch": torch, "omegaconf": omegaconf, "hydra": hydra}
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return [space[name] for name in names]


def save_lara(tokenizer, folder):
    """Stage 1, as LARA's trainer saves it."""
    from moto.experiment.trainer import MotoTokenizerTrainer

    host = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder), should_save=True), is_deepspeed_enabled=False, model=tokenizer
    )
    MotoTokenizerTrainer.save_model(host)
    return folder


def save_moto(tokenizer, folder):
    """As Moto's trainer saves it."""
    folder.mkdir(parents=True)
    path = Path(MOTO) / "latent_motion_tokenizer/src/trainers/latent_motion_tokenizer_trainer.py"
    (save,) = functions_of(path, "save_checkpoint")
    host = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
        latent_motion_tokenizer=tokenizer,
        print=lambda text: None,
    )
    save(host, folder)
    return folder


def load_theirs(folder, kind, encoder):
    """Their class, built and loaded by their loader; then once more, strictly."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if kind == "lara":
            from moto.latent_motion_tokenizer.loading import load_latent_motion_tokenizer

            model = load_latent_motion_tokenizer(folder, image_encoder_path=encoder)
            state = read_tensors(folder / "model.safetensors")
        else:
            (load,) = functions_of(Path(MOTO) / "common/models/model_utils.py", "load_model")
            model = load(str(folder))
            state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert "non-strict" not in said.getvalue(), said.getvalue()
    frozen = {k: v for k, v in model.state_dict().items() if k.startswith(("image_encoder.", "loss_fn_lpips."))}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict({**frozen, **state}, strict=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    sides.set_patch_order(model.image_encoder)
    return model.eval()


KINDS = {
    "lara": SimpleNamespace(build=lara_tokenizer, save=save_lara, to="official"),
    "moto": SimpleNamespace(build=moto_tokenizer, save=save_moto, to="moto"),
}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param("lara", marks=needs_lara), pytest.param("moto", marks=needs_moto)]
)


# ---------------------------------------------------------------------- measuring


def run_theirs(tokenizer, frames):
    seen = {}
    parts = ("vq_down_resampler", "vector_quantizer", "decoder", "loss_fn_lpips")
    handles = [
        getattr(tokenizer, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name in parts
    ]
    with torch.no_grad():
        output = tokenizer(cond_pixel_values=frames[:, 0], target_pixel_values=frames[:, 1])
    for handle in handles:
        handle.remove()
    quantized, indices, terms = seen["vector_quantizer"]
    picture = seen["decoder"]
    return {
        "continuous latent": seen["vq_down_resampler"],
        "quantized latent": quantized,
        "codes": indices.view(len(frames), -1),
        "picture": picture,
        "codebook terms": terms,
        "reconstruction loss": F.mse_loss(picture, frames[:, 1]),
        # Moto goes past the hooks, and says what it is; LARA_full does not say it
        "perceptual loss": seen["loss_fn_lpips"].mean() if "loss_fn_lpips" in seen else output["perceptual_loss"],
        "loss": output["loss"],
    }


def run_ours(lam, frames):
    with torch.no_grad():
        found = lam(frames[:, 0], frames[:, 1])
    first, second = found.codebook_loss, found.commitment_loss
    if lam.config.legacy_commitment:
        first, second = second, first
    return {
        "continuous latent": found.latent.continuous,
        "quantized latent": found.latent.quantized,
        "codes": found.latent.indices,
        "picture": found.reconstruction,
        "codebook terms": first + lam.config.commitment_weight * second,
        "reconstruction loss": found.reconstruction_loss,
        "perceptual loss": found.perceptual_loss,
        "loss": found.loss,
    }


def differences(ours, theirs):
    """Largest relative difference by name; of codes, how many differ."""
    result = {}
    for name, reference in theirs.items():
        if name == "codes":
            result[name] = int((ours[name] != reference).sum())
        else:
            result[name] = float((ours[name] - reference).abs().max() / reference.abs().max())
    return result


def load_ours(folder, tokenizer):
    lam = LatentActionModel.from_pretrained(folder)
    lam.perceptual.hold(tokenizer.loss_fn_lpips)
    lam.perceptual.tried = True
    return lam


def assert_equal(ours, theirs):
    found = differences(ours, theirs)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    logger.info("largest relative differences: %s (of %d codes)", shown, theirs["codes"].numel())
    assert found.pop("codes") == 0
    assert max(found.values()) <= TOLERANCE, found


# ---------------------------------------------------------------------- tests


CHANGES = {
    "as published": {},
    "concat, mask token": {"decoder/config.query_fusion_mode": "concat", "decoder/config.use_mask_token": True},
    "legacy off": {"m_former/config.legacy": False, "vector_quantizer/legacy": False},
}


@kinds
@pytest.mark.parametrize("name", CHANGES)
def test_converted_from_disk_it_computes_the_same_and_so_does_the_way_back(kind, name, encoder, perceptual, tmp_path):
    theirs = KINDS[kind].build(encoder, **CHANGES[name])
    source = KINDS[kind].save(theirs, tmp_path / "theirs")
    report = convert_checkpoint(source, tmp_path / "ours", frames="unit", allow_pickle=kind == "moto")
    assert report.source_layout == KINDS[kind].to
    assert report.tensors == len(theirs.get_state_dict_to_save())
    ours = load_ours(tmp_path / "ours", theirs)
    frames = batch()
    reference = run_theirs(theirs, frames)
    assert len(reference["codes"].unique()) > 4
    assert_equal(run_ours(ours, frames), reference)

    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to=KINDS[kind].to)
    again = load_theirs(tmp_path / "back", kind, encoder)
    saved = theirs.get_state_dict_to_save()
    assert all(torch.equal(saved[k], v) for k, v in again.get_state_dict_to_save().items())
    found = differences(run_theirs(again, frames), reference)
    assert max(found.values()) == 0, found


@kinds
def test_normalised_frames_theirs_and_plain_ones_ours(kind, encoder, perceptual, tmp_path):
    """Joint training's convention: the official model is given normalised frames, ours the plain ones."""
    theirs = KINDS[kind].build(encoder)
    source = KINDS[kind].save(theirs, tmp_path / "theirs")
    report = convert_checkpoint(source, tmp_path / "ours", frames="imagenet", allow_pickle=kind == "moto")
    ours = load_ours(tmp_path / "ours", theirs)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (report.frames_mean, report.frames_std))
    frames = batch()
    normal = (frames - mean) / std
    reference, found = run_theirs(theirs, normal), run_ours(ours, frames)
    # the losses are in other units, so they are computed from our picture in theirs
    found["picture"] = (found["picture"] - mean) / std
    found["reconstruction loss"] = F.mse_loss(found["picture"], normal[:, 1])
    found["perceptual loss"] = theirs.loss_fn_lpips(normal[:, 1], found["picture"], normalize=True).mean()
    found["loss"] = found["codebook terms"] + found["reconstruction loss"] + found["perceptual loss"]
    assert_equal(found, reference)

    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to=KINDS[kind].to)
    again = load_theirs(tmp_path / "back", kind, encoder)
    assert_equal(run_theirs(again, normal), reference)


@kinds
def test_a_second_decoder_is_refused(kind, encoder, perceptual, tmp_path):
    """Moto's option: a decoder of hidden states beside that of pixels."""
    theirs = KINDS[kind].build(encoder)
    part = "hidden_state_decoder" + ("_config" if kind == "lara" else "")
    if kind == "lara":
        theirs.config.hidden_state_decoder_config = dict(theirs.config.decoder_config)
    else:
        theirs.config.hidden_state_decoder = theirs.config.decoder
    source = KINDS[kind].save(theirs, tmp_path / "theirs")
    with pytest.raises(ValueError, match=part):
        convert_checkpoint(source, tmp_path / "ours", allow_pickle=True)
    assert not (tmp_path / "ours").exists()


@kinds
@pytest.mark.parametrize("wrong", ["key and value exchanged", "two norms exchanged", "token types"])
def test_the_comparison_sees_a_wrong_mapping(kind, wrong, encoder, perceptual, tmp_path, monkeypatch):
    entries = mapping._entries

    def wrongly(config):
        for entry in entries(config):
            if wrong == "key and value exchanged" and entry.own == "inverse_dynamics.layers.1.key_value.weight":
                entry = entry._replace(official=entry.official[::-1])
            if wrong == "two norms exchanged" and entry.own.startswith("forward_dynamics.layers.0."):
                swap = {"layernorm_before": "layernorm_after", "layernorm_after": "layernorm_before"}
                for one, other in swap.items():
                    if one in entry.official[0]:
                        entry = entry._replace(official=(entry.official[0].replace(one, other),))
                        break
            yield entry

    monkeypatch.setattr(mapping, "_entries", wrongly)
    theirs = KINDS[kind].build(encoder)
    source = KINDS[kind].save(theirs, tmp_path / "theirs")
    convert_checkpoint(source, tmp_path / "ours", frames="unit", allow_pickle=kind == "moto")
    ours = load_ours(tmp_path / "ours", theirs)
    if wrong == "token types":
        object.__setattr__(ours.config, "legacy_token_types", False)
    frames = batch()
    with pytest.raises(AssertionError):
        assert_equal(run_ours(ours, frames), run_theirs(theirs, frames))


# ---------------------------------------------------------------------- a policy of the joint training


@needs_lara
def test_out_of_a_policy_of_the_joint_training(encoder, perceptual, tmp_path):
    """Their joint policy, saved in shards by their trainer; the adapter made of it gives the same alignment loss."""
    official = sides.import_official(Path(LARA).resolve())
    stage1 = save_lara(lara_tokenizer(encoder), tmp_path / "stage1")
    theirs = sides.official_policy(official, with_lara=True)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.action_head.configure_latent_motion(
            tokenizer_path=str(stage1), tune_tokenizer=True, token_count=4, codebook_dim=8
        )
    tokenizer = fill(theirs.action_head.latent_motion_tokenizer)
    rest = nn.ModuleDict({"backbone": theirs.backbone, "model": theirs.action_head.model,
                          "head": theirs.action_head.pred_latent_motion_head})  # fmt: skip
    sides.randomize(rest, 5)
    host = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path / "policy"), should_save=True),
        is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(is_main_process=True, unwrap_model=lambda model: model),
        model=SimpleNamespace(
            state_dict=theirs.state_dict,
            action_head=theirs.action_head,
            save_pretrained=functools.partial(theirs.save_pretrained, max_shard_size="150KB"),
        ),
    )
    official.trainer.DualBrainTrainer.save_model(host)
    assert len(list((tmp_path / "policy").glob("model-*.safetensors"))) > 2

    report = convert_checkpoint(tmp_path / "policy", tmp_path / "adapter", adapter=True)
    assert report.prefix == "action_head.latent_motion_tokenizer."
    assert report.frames_folded  # joint training gives it normalised frames
    # the folder of the tokenizer that their trainer writes beside it is the same model
    convert_checkpoint(tmp_path / "policy", tmp_path / "lam", subfolder="latent_motion_tokenizer")
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("adapter/lam", "lam"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    ours = sides.official_policy(official, with_lara=False)
    own = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    ours.load_state_dict(own, strict=True)
    lara = load_lara(ours.train(), tmp_path / "adapter", frames=lambda b: FramePair.from_tensor(b["frames"]))
    lara.lam.perceptual.hold(tokenizer.loss_fn_lpips)
    lara.lam.perceptual.tried = True
    inputs = sides.make_batch(3, torch.float32)
    reference = parity.run_official(
        official, theirs.train(), inputs, sides.Case("joint", normalized=True, switch=False), 11
    ).values
    torch.manual_seed(11)
    ours(dict(inputs))
    relative = abs(float(lara.losses.align) - float(reference["align"])) / abs(float(reference["align"]))
    logger.info("alignment loss: relative difference %.1e", relative)
    assert relative <= TOLERANCE
    shutil.rmtree(tmp_path / "policy")
