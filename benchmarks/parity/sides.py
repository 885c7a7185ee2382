"""Both sides of the parity with LARA_full, from the same weights: its code and tokenizer, stand-ins, and our LAM."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.checkout import Missing, add_checkout
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.convert import config_from_official, config_to_official, state_from_official, state_to_official
from lara_adapter.storage.files import write_json, write_tensors

TOKENIZER_SOURCES = (  # the same in both releases
    "moto/latent_motion_tokenizer/loading.py",
    "moto/latent_motion_tokenizer/model/latent_motion_tokenizer.py",
    "moto/latent_motion_tokenizer/model/m_former.py",
    "moto/latent_motion_tokenizer/model/vector_quantizer.py",
    "moto/latent_motion_tokenizer/model/latent_motion_decoder.py",
    "moto/latent_motion_tokenizer/model/modeling_lmd_vit.py",
)
SOURCES = (
    "lara_full/model/action_head/flow_matching_action_head.py",
    "lara_full/model/action_head/cross_attention_dit.py",
    "lara_full/model/gr00t_n1.py",
    "lara_full/experiment/trainer.py",
    *TOKENIZER_SOURCES,
)
BATCH, HORIZON, ACTION, STATE, IMAGE, PATCH = 4, 16, 32, 64, 64, 16
VLM_TOKENS, VLM_WIDTH, EMBODIMENTS = 10, 48, 4
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """One comparison.

    normalized: frames reach the tokenizer ImageNet-normalised, as in LARA's joint training; False: in [0, 1], as in its
        pre-training.
    switch: the reference gets the patch order of ours.
    kinks: LPIPS keeps its ReLUs and max poolings; its gradients are then judged in float64 only.
    changes: our configuration's fields that differ from the release's.
    """

    name: str
    normalized: bool = False
    switch: bool = True
    kinks: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


class VLMStandIn(nn.Module):
    """In the place of the Eagle VLM: one linear layer over given features."""

    def __init__(self, width: int = VLM_WIDTH) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)

    def prepare_input(self, batch: dict[str, Any]) -> Any:
        """The batch as the official backbone returns it."""
        from transformers.feature_extraction_utils import BatchFeature

        return BatchFeature(data=dict(batch))

    def forward(self, batch: Any) -> Any:
        """Features [B, S, D] and their mask."""
        from transformers.feature_extraction_utils import BatchFeature

        features = self.projection(batch["vlm_features"])
        mask = torch.ones(features.shape[:2], dtype=torch.bool)
        return BatchFeature(data={"backbone_features": features, "backbone_attention_mask": mask})


def import_official(source: Path) -> types.SimpleNamespace:
    """The official modules, from a checkout of LARA_full.

    Raises:
        Missing: no such checkout, or a package that it needs cannot be imported.
    """
    source = add_checkout(source, "LARA_full", contains=SOURCES[0])
    # The package also imports its serving class, and with it video readers that training's arithmetic does not need.
    serving = types.ModuleType("lara_full.model.policy")
    serving.Gr00tPolicy = None  # type: ignore[attr-defined]
    sys.modules.setdefault(serving.__name__, serving)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import lara_full.experiment.trainer as trainer
            import lara_full.model.gr00t_n1 as gr00t
            import lpips
            import transformers
    except ImportError as error:
        raise Missing(f"the official code in {source} cannot be imported: {error}") from error
    return types.SimpleNamespace(source=source, trainer=trainer, gr00t=gr00t, lpips=lpips, transformers=transformers)


def official_policy(
    official: types.SimpleNamespace, with_lara: bool, changes: dict[str, Any] | None = None, vlm_width: int = VLM_WIDTH
) -> nn.Module:
    """A tiny GR00T_N1_5 of the official code, in N1.5's proportions: dropout 0.2, alternating attention, ada_norm.

    Args:
        official: the modules.
        with_lara: with the official LARA.
        changes: settings of the action head that differ, those of its two transformers by name; None: none.
        vlm_width: of the stand-in for the VLM.
    """
    heads, size, depth = 4, 16, 6
    attention = {"num_attention_heads": heads, "attention_head_dim": size, "dropout": 0.2, "final_dropout": True,
                 "positional_embeddings": None}  # fmt: skip
    head = {
        "diffusion_model_cfg": {**attention, "num_layers": depth, "output_dim": 64, "norm_type": "ada_norm",
                                "interleave_self_attention": True, "cross_attention_dim": VLM_WIDTH},
        "vl_self_attention_cfg": {"num_attention_heads": 4, "attention_head_dim": VLM_WIDTH // 4, "dropout": 0.2,
                                  "final_dropout": True, "num_layers": 2, "positional_embeddings": None},
        "input_embedding_dim": heads * size, "backbone_embedding_dim": VLM_WIDTH, "hidden_size": 64,
        "action_dim": ACTION, "max_action_dim": ACTION, "action_horizon": HORIZON, "max_state_dim": STATE,
        "max_num_embodiments": EMBODIMENTS, "num_inference_timesteps": 4, "noise_beta_alpha": 1.5, "noise_beta_beta": 1.0,
        "noise_s": 0.999, "num_timestep_buckets": 1000, "max_seq_len": 64, "add_pos_embed": True, "use_vlln": True,
        "tune_projector": True, "tune_diffusion_model": True, "expand_batch": None,
        "use_latent_motion_queries": with_lara,
    }  # fmt: skip
    for name, value in (changes or {}).items():
        head[name] = {**head[name], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    config = official.gr00t.GR00T_N1_5_Config(
        backbone_cfg={"width": vlm_width},
        action_head_cfg=head,
        action_horizon=HORIZON,
        action_dim=ACTION,
        compute_dtype="float32",
    )
    before = official.gr00t.EagleBackbone
    official.gr00t.EagleBackbone = VLMStandIn
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return official.gr00t.GR00T_N1_5(config, local_model_path="")
    finally:
        official.gr00t.EagleBackbone = before


def randomize(module: nn.Module, seed: int) -> None:
    """Weights under which every part matters: unit gain, norms and biases off their start, codes of z's size."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        if "codes" in name or "vector_quantizer" in name:
            value = 0.5 * noise
        elif parameter.ndim < 2:
            value = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif any(word in name for word in ("position", "token", "embedding.weight")):
            value = 0.5 * noise
        else:  # [out, in], [out, in, h, w], or the category-specific [category, in, out]
            inputs = parameter.shape[1] if name.endswith(".W") else math.prod(parameter.shape[1:])
            value = noise / inputs**0.5
        with torch.no_grad():
            parameter.copy_(value)


def perceptual_stand_in(lpips_class: Any, kinks: bool) -> nn.Module:
    """LPIPS over a VGG16 of random weights (the trained ones are a download), the same for every run."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of how lpips calls it
        torch.manual_seed(0)
        distance: nn.Module = lpips_class(net="vgg", pnet_rand=True, verbose=False)
    for part in distance.net.children() if not kinks else ():
        for name, layer in part.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(part, name, nn.Softplus(beta=4))
            elif isinstance(layer, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2))
    return distance


def lam_config(case: Case) -> LatentActionConfig:
    """A tiny LAM in the release's settings, with the case's changes."""
    settings: dict[str, Any] = dict(
        image_size=IMAGE, image_encoder="tiny", image_mean=(0.0,) * 3, image_std=(1.0,) * 3, encoder_patch_size=PATCH,
        encoder_width=32, queries=8, latent_dim=32, idm_width=48, idm_layers=2, idm_heads=4, idm_mlp=96,
        legacy_token_types=True, fdm_width=48, fdm_layers=2, fdm_heads=4, fdm_mlp=96, fdm_patch_size=PATCH,
        codebook_size=128, legacy_commitment=True,
    )  # fmt: skip
    return LatentActionConfig(**{**settings, **case.changes})


@contextlib.contextmanager
def official_checkpoint(
    official: types.SimpleNamespace, config: LatentActionConfig, seed: int, kinks: bool
) -> Iterator[tuple[Path, Path, dict[str, Tensor]]]:
    """A checkpoint of a random LAM in the official layout; within the context their LPIPS is the stand-in.

    Yields:
        Folder of the tokenizer, folder of its image encoder, and the tensors that were written.
    """
    settings = official.transformers.ViTMAEConfig(
        hidden_size=config.encoder_width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=IMAGE, patch_size=PATCH, decoder_num_hidden_layers=1, decoder_hidden_size=16,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    real = official.lpips.LPIPS
    with tempfile.TemporaryDirectory() as scratch:
        folder, encoder_folder = Path(scratch) / "tokenizer", Path(scratch) / "encoder"
        encoder = official.transformers.ViTMAEModel(settings)
        randomize(encoder, seed + 1)
        encoder.save_pretrained(encoder_folder)
        written = state_to_official(LatentActionModel(config, backbone=encoder).state_dict(), config)
        folder.mkdir()
        write_json(folder / "config.json", config_to_official(config, str(encoder_folder)))
        write_tensors(folder / "model.safetensors", written)
        official.lpips.LPIPS = lambda **_: perceptual_stand_in(real, kinks)
        try:
            yield folder, encoder_folder, written
        finally:
            official.lpips.LPIPS = real


def randomize_tokenizer(tokenizer: Any, written: dict[str, Tensor], seed: int) -> None:
    """Check that the official loader took every tensor that was written, then give the tokenizer weights that matter."""
    theirs = tokenizer.get_state_dict_to_save()
    for name, tensor in written.items():
        if not torch.equal(theirs.pop(name), tensor):
            raise AssertionError(f"{name} is not what state_to_official wrote")
    if theirs:
        raise AssertionError(f"state_to_official wrote no {sorted(theirs)}")
    for part in ("m_former", "vector_quantizer", "vq_down_resampler", "vq_up_resampler", "decoder"):
        randomize(getattr(tokenizer, part), seed + 2)
    spread_codes(tokenizer, seed)


def add_tokenizer(
    official: types.SimpleNamespace, policy: Any, config: LatentActionConfig, seed: int, kinks: bool
) -> None:
    """Put the official tokenizer into the policy by the official loader, from a checkpoint that ours was written to."""
    output = io.StringIO()
    with official_checkpoint(official, config, seed, kinks) as (folder, _, written), contextlib.redirect_stdout(output):
        policy.action_head.configure_latent_motion(tokenizer_path=str(folder), tune_tokenizer=True)
    if "non-strict" in output.getvalue():
        raise AssertionError(f"the official loader did not take what state_to_official wrote: {output.getvalue()}")
    randomize_tokenizer(policy.action_head.latent_motion_tokenizer, written, seed)


@torch.no_grad()
def spread_codes(tokenizer: Any, seed: int) -> None:
    """Give the codebook values near latents of other frames, so that many codes are in use."""
    codes = tokenizer.vector_quantizer.embedding.weight
    handle = set_patch_order(tokenizer.image_encoder)
    frames = make_batch(seed + 500, torch.float32, batch=len(codes) // tokenizer.m_former.query_num)["frames"]
    latents = tokenizer(frames[:, 0], frames[:, 1]).embed.flatten(0, 1)
    handle.remove()
    g = torch.Generator().manual_seed(seed + 501)
    codes.copy_(latents + 0.3 * latents.std(0) * torch.randn(codes.shape, generator=g))


def set_patch_order(encoder: nn.Module) -> Any:
    """THE SWITCH: rising noise keeps ViT-MAE's patches in reading order. Returns the handle that takes it off."""

    def rising(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        noise = torch.arange((IMAGE // PATCH) ** 2, dtype=torch.float32).expand(len(args[0]), -1)
        return args, {**kwargs, "noise": noise}

    return encoder.register_forward_pre_hook(rising, with_kwargs=True)


class NormalizedFrames(nn.Module):
    """A LAM that is given ImageNet-normalised frames throughout, as the official joint training does."""

    draws_random_numbers = False

    def __init__(self, lam: LatentActionModel) -> None:
        super().__init__()
        self.inner = lam
        self.latent_width = lam.latent_width

    def encode(self, frame_t: Tensor, frame_future: Tensor) -> Any:
        """As the LAM's."""
        return self.inner.encode(normalize(frame_t), normalize(frame_future))

    def forward(self, frame_t: Tensor, frame_future: Tensor, valid: Tensor | None = None) -> Any:
        """As the LAM's."""
        return self.inner(normalize(frame_t), normalize(frame_future), valid)


def normalize(frames: Tensor) -> Tensor:
    """ImageNet-normalise [..., 3, H, W] in [0, 1]."""
    mean, std = (torch.tensor(values, dtype=frames.dtype).view(3, 1, 1) for values in IMAGENET)
    return (frames - mean) / std


@contextlib.contextmanager
def keep_float64() -> Iterator[None]:
    """Within this, nothing goes through float32 on its way.

    Ours computes its losses in float32 whatever comes in, and transformers' eager attention, which the official decoder
    uses, its softmax: here both stay in float64.
    """
    to_float, softmax = Tensor.float, F.softmax

    def wide_float(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *args, **kwargs)

    def wide_softmax(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tensor.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(tensor, *args, **kwargs)

    Tensor.float, F.softmax = wide_float, wide_softmax  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.float, F.softmax = to_float, softmax  # type: ignore[method-assign]


def converted(tokenizer: Any, config: LatentActionConfig, dtype: torch.dtype) -> Any:
    """Our LAM from what the official one would save: settings as plain data, tensors through the strict map."""
    read = config_from_official(tokenizer.config.to_dict(), image_encoder="tiny")
    if read != config:
        raise AssertionError(f"config_from_official gave {read}, but {config} was written")
    return take_weights(tokenizer, read, dtype)


def take_weights(tokenizer: Any, config: LatentActionConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Our LAM with the official one's weights, image encoder and LPIPS."""
    lam: Any = LatentActionModel(config, backbone=tokenizer.image_encoder).to(dtype)
    state = {name: t.clone() for name, t in tokenizer.get_state_dict_to_save().items()}
    lam.load_state_dict(state_from_official(state, config), strict=True)
    if lam.perceptual is not None:
        lam.perceptual.hold(tokenizer.loss_fn_lpips)
        lam.perceptual.tried = True
    return lam


def make_batch(seed: int, dtype: torch.dtype, batch: int = BATCH) -> dict[str, Tensor]:
    """Random features, state, actions (some of their dimensions padded) and frames in [0, 1] [B, 2, 3, S, S]."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, HORIZON, ACTION, dtype=torch.bool)
    mask[..., :7] = True
    # smooth pictures, the second a little changed: white noise would make all latents alike
    first = F.interpolate(torch.rand(batch, 3, 8, 8, generator=g), size=IMAGE, mode="bilinear")
    second = F.interpolate(torch.rand(batch, 3, 8, 8, generator=g), size=IMAGE, mode="bilinear")
    frames = torch.stack([first, 0.5 * (first + second)], dim=1)
    frames = (frames * 255).round() / 255
    return {
        "vlm_features": torch.randn(batch, VLM_TOKENS, VLM_WIDTH, generator=g).to(dtype),
        "state": torch.randn(batch, 1, STATE, generator=g).to(dtype),
        "action": torch.randn(batch, HORIZON, ACTION, generator=g).to(dtype) * mask,
        "action_mask": mask,
        "embodiment_id": torch.randint(0, EMBODIMENTS, (batch,), generator=g),
        "frames": frames.to(dtype),
    }
