"""Parity with the official release: their GR00T N1.5 with LARA against the same policy with `attach_lara`.

    pip install "transformers==4.51.3" "diffusers==0.35.1" torchvision accelerate lpips
    pip install hydra-core omegaconf einops dm-tree
    git clone https://github.com/lmy1001/LARA
    python -m benchmarks.parity.official --official LARA/LARA_full      # or LARA_OFFICIAL_SRC=LARA/LARA_full

The official code is imported and never changed. Both sides get the same weights, seeds (so the same flow noise, times
and dropout), frames and perceptual network; ours gets the tokenizer's weights through `lara_adapter.convert`.
Compared: L_ACT, the alignment loss, L_LAM and its terms, the total (summed by the official trainer's own
`compute_loss`), the latent, its codes, and every gradient by name, of each loss on its own and of the total.

ONE SWITCH is needed on their side: transformers' ViTMAEModel shuffles the patches at random even at mask_ratio 0,
unless it is given `noise`. The reference gets rising noise: the order that ours always has. A last run leaves the
switch off, for the record. What else differs by default is set alike and printed as settings. Stand-ins, the same on
both sides: tiny sizes and random weights, a linear layer in place of the Eagle VLM, and LPIPS with its own linear
weights over a VGG16 of random weights, its ReLUs and max poolings made smooth. Where they are kept, a rounding error of
1e-7 in the predicted frame switches a few, and gradients move by more than the tolerance (theirs in float32 against
theirs in float64 just as well, which is printed): that is a case of its own, whose gradients are judged in float64.

Differences: max |ours - theirs| over max |theirs|, per tensor. A gradient that is zero apart from rounding (the key biases
of attention: softmax does not see them) is held against the largest gradient of that loss instead; which ones those
are is taken from the float64 run. Exit status: 0, 1 if a relative difference in float32 exceeds 1e-5 (in float64
1e-10), a code differs or a tensor is left out on one side, 2 if the official code is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.checkout import Missing, add_checkout
from lara_adapter import FramePair, LatentActionConfig, LatentActionModel, __version__, attach_lara
from lara_adapter.convert import config_from_official, config_to_official, state_from_official, state_to_official
from lara_adapter.storage.files import write_json, write_tensors

RESULT = RESULTS / "parity_official.json"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ZERO = 1e-12  # of the largest gradient of a loss: what is below that in float64 is zero apart from rounding
LOSSES = ("action", "align", "lam", "total")
SOURCES = (
    "lara_full/model/action_head/flow_matching_action_head.py",
    "lara_full/model/action_head/cross_attention_dit.py",
    "lara_full/model/gr00t_n1.py",
    "lara_full/experiment/trainer.py",
    "moto/latent_motion_tokenizer/loading.py",
    "moto/latent_motion_tokenizer/model/latent_motion_tokenizer.py",
    "moto/latent_motion_tokenizer/model/m_former.py",
    "moto/latent_motion_tokenizer/model/vector_quantizer.py",
    "moto/latent_motion_tokenizer/model/latent_motion_decoder.py",
    "moto/latent_motion_tokenizer/model/modeling_lmd_vit.py",
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


CASES = (
    Case("release, frames in [0, 1]"),
    Case("release, frames ImageNet-normalised", normalized=True),
    Case("legacy=False on both sides", changes={"legacy_token_types": False, "legacy_commitment": False}),
    Case("fusion concat, mask token", changes={"fusion": "concat", "mask_token": True}),
    Case("release, perceptual off", changes={"perceptual_weight": 0.0}),
    Case("release, LPIPS with its kinks", kinks=True),
    Case("release, switch OFF", switch=False),
)

SETTINGS = {
    "attach_lara": 'layer=-3, token="last", projector="linear", alignment="cosine", align_weight=0.01, lam_weight=0.01',
    "legacy_token_types": "True: the release gives both frames token type 0 (and False against their legacy=False)",
    "legacy_commitment": "True: the release weighs the codebook term with beta (and False against their legacy=False)",
    "image_mean, image_std": "0 and 1: the official tokenizer normalises nothing itself; its joint training feeds "
    "ImageNet-normalised frames, compared here by normalising in front of both LAMs",
    "frames": "one pair, one view, all valid: the release has no valid flags",
    "patch order": "theirs: noise=arange to ViTMAEModel (the one switch); ours always has the reading order",
}


# ---------------------------------------------------------------------- the official side


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


# ---------------------------------------------------------------------- our side


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


# ---------------------------------------------------------------------- one run of each


@dataclass
class Measured:
    """One side: scalars and tensors by name, codes, gradients by loss and official name, trainable tensors."""

    values: dict[str, Tensor]
    codes: Tensor
    gradients: dict[str, dict[str, Tensor]]
    trainable: set[str]


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


def gradients(losses: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The gradient of each loss by parameter name; parameters that a loss does not reach are absent."""
    found = {}
    for name, loss in losses.items():
        result = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found[name] = {key: grad for key, grad in zip(parameters, result) if grad is not None}
    return found


def run_official(
    official: types.SimpleNamespace,
    policy: Any,
    batch: dict[str, Tensor],
    case: Case,
    seed: int,
    order: int | None = None,
) -> Measured:
    """One training forward of the official model and trainer, and the gradients.

    Args:
        official: the modules.
        policy: their policy.
        batch: from :func:`make_batch`.
        case: whether frames are normalised, and the switch is on.
        seed: of flow noise, times and dropout.
        order: seed of the patch order, where the switch is off; None: it follows from `seed`.
    """
    tokenizer = policy.action_head.latent_motion_tokenizer
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, module in (
            ("lam", tokenizer), ("quantizer", tokenizer.vector_quantizer), ("decoder", tokenizer.decoder),
            ("perceptual", tokenizer.loss_fn_lpips),
        )
    ]  # fmt: skip
    if case.switch:
        handles.append(set_patch_order(tokenizer.image_encoder))
    if order is not None:  # the tokenizer draws last: flow noise and dropout do not change
        handles.append(tokenizer.register_forward_pre_hook(lambda m, a: (torch.manual_seed(order), None)[1]))
    inputs = {key: value for key, value in batch.items() if key != "frames"}
    frames = normalize(batch["frames"]) if case.normalized else batch["frames"]
    inputs["images"] = frames[:, None]
    # the trainer's own sum of the three losses, without a trainer around it
    host = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(unwrap_model=lambda model: model),
        args=types.SimpleNamespace(logging_steps=2),
        state=types.SimpleNamespace(global_step=1),
    )
    torch.manual_seed(seed)
    total, output = official.trainer.DualBrainTrainer.compute_loss(host, policy, inputs, return_outputs=True)
    for handle in handles:
        handle.remove()
    losses = {
        "action": output["loss"],
        "align": output["latent_loss"],
        "lam": output["tokenizer_vae_loss"],
        "total": total,
    }
    values = {
        "lam: reconstruction": F.mse_loss(seen["decoder"], frames[:, 1]),
        "lam: codebook and commitment": seen["quantizer"][2],
        "lam: perceptual": seen["perceptual"].mean() if "perceptual" in seen else torch.zeros_like(total),
        "predicted frame": seen["decoder"],
    }
    return their_measured(policy, losses, values, seen["lam"])


def their_measured(policy: Any, losses: dict[str, Tensor], values: dict[str, Tensor], found: Any) -> Measured:
    """The result of the official side; `found` is the output of its tokenizer."""
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    values = {**losses, **values, "latent, continuous": found.embed, "latent, quantized": found.quant}
    return Measured(
        {name: value.detach() for name, value in values.items()},
        found.indices.view(BATCH, -1),
        gradients(losses, parameters),
        set(parameters),
    )


def run_ours(policy: Any, lara: Any, batch: dict[str, Tensor], config: LatentActionConfig, seed: int) -> Measured:
    """One training forward of the policy with LARA attached, and the gradients under official names."""
    seen: dict[str, Any] = {}
    handles = [
        policy.action_head.register_forward_hook(lambda m, a, out: seen.update(action=out["loss"])),
        lara.lam.register_forward_hook(lambda m, a, out: seen.update(lam=out)),
    ]
    torch.manual_seed(seed)
    output = policy(dict(batch))
    for handle in handles:
        handle.remove()
    losses = {"action": seen["action"], "align": lara.losses.align, "lam": lara.losses.lam, "total": output["loss"]}
    template = getattr(lara.lam, "inner", lara.lam).state_dict()
    return our_measured(policy, losses, seen["lam"], config, lambda found: official_names(found, template, config))


def our_measured(
    policy: Any,
    losses: dict[str, Tensor],
    found: Any,
    config: LatentActionConfig,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Measured:
    """The result of our side, under official names.

    Args:
        policy: with LARA attached.
        losses: by name.
        found: the output of the LAM.
        config: the LAM's.
        rename: our names of tensors to the official ones.
    """
    terms = (found.codebook_loss, found.commitment_loss)
    first, second = terms[::-1] if config.legacy_commitment else terms
    values = {
        **losses,
        "lam: reconstruction": found.reconstruction_loss,
        "lam: codebook and commitment": first + config.commitment_weight * second,
        "lam: perceptual": found.perceptual_loss,
        "latent, continuous": found.latent.continuous,
        "latent, quantized": found.latent.quantized,
        "predicted frame": found.reconstruction,
    }
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return Measured(
        {name: value.detach() for name, value in values.items()},
        found.latent.indices,
        {loss: rename(grads) for loss, grads in gradients(losses, parameters).items()},
        set(rename({name: p.detach() for name, p in parameters.items()})),
    )


def official_names(
    found: dict[str, Tensor], template: dict[str, Tensor], config: LatentActionConfig
) -> dict[str, Tensor]:
    """Our gradients under the official names: those of projector and LAM mapped.

    Args:
        found: our name to gradient.
        template: the LAM's state, for names and shapes.
        config: the LAM's.
    """
    result, lam = {}, {}
    for name, grad in found.items():
        if name.startswith("lara.projector."):
            result[f"action_head.pred_latent_motion_head.{name.removeprefix('lara.projector.')}"] = grad
        elif name.startswith("lara.lam."):
            lam[name.removeprefix("lara.lam.").removeprefix("inner.")] = grad
        else:
            result[name] = grad
    # The map only renames, splits and reshapes, so it maps gradients too; NaN stands for "not reached".
    unknown = lam.keys() - template.keys()
    if unknown:
        raise AssertionError(f"gradients of no tensor of the LAM: {sorted(unknown)}")
    trained = {name: lam.get(name, torch.full_like(tensor, math.nan))
               for name, tensor in template.items() if name.partition(".")[0] != "quantizer"}  # fmt: skip
    trained["quantizer.weight"] = lam.get("quantizer.weight", torch.full_like(template["quantizer.weight"], math.nan))
    books = {name: tensor for name, tensor in template.items() if name not in trained}
    books["quantizer.offset"] = torch.zeros_like(books["quantizer.offset"])
    for name, grad in state_to_official({**trained, **books}, config).items():
        if not grad.isnan().all():
            result[f"action_head.latent_motion_tokenizer.{name}"] = grad
    return result


# ---------------------------------------------------------------------- comparison


def measure(
    official: types.SimpleNamespace, case: Case, seed: int, dtype: torch.dtype
) -> tuple[Measured, Measured, Measured | None]:
    """Build both sides from the same weights and run them.

    Returns:
        Theirs, ours, and without the switch theirs once more, with another draw of the patch order.
    """
    config = lam_config(case)
    torch.manual_seed(seed)
    theirs: Any = official_policy(official, with_lara=True)
    randomize(theirs, seed)
    add_tokenizer(official, theirs, config, seed, case.kinks)
    theirs.to(dtype).train()

    ours: Any = official_policy(official, with_lara=False)
    own = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    ours.to(dtype).load_state_dict(own, strict=True)
    lam = converted(theirs.action_head.latent_motion_tokenizer, config, dtype)
    lara = attach_lara(
        ours.train(), NormalizedFrames(lam) if case.normalized else lam, layer=-3,
        blocks="action_head.model.transformer_blocks", token="last", projector="linear", alignment="cosine",
        align_weight=0.01, lam_weight=0.01, frames=lambda b: FramePair.from_tensor(b["frames"]),
    )  # fmt: skip
    lara.projector.to(dtype).load_state_dict(theirs.action_head.pred_latent_motion_head.state_dict())
    if dtype == torch.float64:
        lara.to(dtype)

    batch = make_batch(seed, dtype)
    with keep_float64() if dtype == torch.float64 else contextlib.nullcontext():
        reference = run_official(official, theirs, batch, case, seed)
        result = run_ours(ours, lara, batch, config, seed)
        again = None if case.switch else run_official(official, theirs, batch, case, seed, order=seed + 1000)
    return reference, result, again


def tensor_group(name: str) -> str:
    """The row of the table that a tensor belongs to."""
    for prefix, group in (
        ("backbone.", "VLM stand-in"),
        ("action_head.model.transformer_blocks.", "DiT blocks"),
        ("action_head.pred_latent_motion_head.", "projector"),
        ("action_head.latent_motion_tokenizer.m_former.", "LAM: M-Former"),
        ("action_head.latent_motion_tokenizer.vector_quantizer.", "LAM: codebook"),
        ("action_head.latent_motion_tokenizer.vq_", "LAM: resamplers"),
        ("action_head.latent_motion_tokenizer.decoder.", "LAM: decoder"),
    ):
        if name.startswith(prefix):
            return group
    return "rest of the head"


def difference(ours: Tensor, theirs: Tensor, scale: float | None = None) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest reference value (or over `scale`)."""
    absolute = float((ours.double() - theirs.double()).abs().max())
    largest = float(theirs.double().abs().max()) if scale is None else scale
    return absolute, absolute / largest if largest > 0 else (0.0 if absolute == 0 else math.inf)


def zeros(measured: Measured) -> dict[str, set[str]]:
    """By loss, the tensors whose gradient in float64 is zero apart from rounding."""
    result = {}
    for loss, grads in measured.gradients.items():
        largest = max(float(grad.abs().max()) for grad in grads.values())
        result[loss] = {name for name, grad in grads.items() if float(grad.abs().max()) <= ZERO * largest}
    return result


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], rounding: set[str]) -> float:
    """Largest relative difference of gradients from the reference's in float64, those that are zero left out."""
    return max(difference(grad, exact[name])[1] for name, grad in found.items() if name not in rounding)


def compare(
    theirs: Measured, ours: Measured, rounding: dict[str, set[str]], group: Callable[[str], str] = tensor_group
) -> dict[str, Any]:
    """Every difference of one run.

    Args:
        theirs: the reference.
        ours: what is compared with it.
        rounding: by loss, gradients to be held against the largest of the loss; from :func:`zeros`.
        group: the row of the table that a tensor belongs to, by its name.
    """
    rows = {}
    for name, reference in theirs.values.items():
        absolute, relative = difference(ours.values[name].view_as(reference), reference)
        rows[name] = {"abs": absolute, "rel": relative}
        if reference.ndim == 0:
            rows[name] |= {"official": float(reference), "ours": float(ours.values[name])}
    grads: dict[str, Any] = {}
    left_out = {"trainable": sorted(theirs.trainable ^ ours.trainable)}
    for loss, reference in theirs.gradients.items():
        found = ours.gradients[loss]
        left_out[loss] = sorted(reference.keys() ^ found.keys())
        largest = max(float(grad.abs().max()) for grad in reference.values())
        groups: dict[str, Any] = {}
        for name in sorted(reference.keys() & found.keys()):
            row = groups.setdefault(
                group(name), {"tensors": 0, "zero": 0, "abs": 0.0, "rel": 0.0, "worst": "", "largest": 0.0}
            )
            zero = name in rounding[loss]
            absolute, relative = difference(found[name], reference[name], largest if zero else None)
            row["tensors"] += 1
            row["zero"] += zero
            row["abs"] = max(row["abs"], absolute)
            row["largest"] = max(row["largest"], float(reference[name].abs().max()))
            if relative >= row["rel"]:
                row["rel"], row["worst"] = relative, name
        grads[loss] = groups
    return {
        "values": rows,
        "gradients": grads,
        "left_out": left_out,
        "trainable_tensors": len(theirs.trainable),
        "without_gradient": sorted(theirs.trainable - theirs.gradients["total"].keys()),
        "codes_that_differ": int((theirs.codes != ours.codes).sum()),
        "codes": theirs.codes.numel(),
        "codes_used": len(theirs.codes.unique()),
    }


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of several seeds; values and counts are those of the first."""
    worst: dict[str, Any] = json.loads(json.dumps(results[0]))
    for other in results[1:]:
        pairs = [(worst["values"][name], row) for name, row in other["values"].items()]
        pairs += [
            (worst["gradients"][loss][group], row)
            for loss, groups in other["gradients"].items()
            for group, row in groups.items()
        ]
        for row, new in pairs:
            row["abs"] = max(row["abs"], new["abs"])
            if new["rel"] > row["rel"]:
                row["rel"] = new["rel"]
                if "worst" in row:
                    row["worst"] = new["worst"]
        for loss, names in other["left_out"].items():
            worst["left_out"][loss] = sorted({*worst["left_out"][loss], *names})
        for key in ("codes", "codes_that_differ"):
            worst[key] += other[key]
    worst["largest_rel"] = largest_relative(worst)
    return worst


def largest_relative(result: dict[str, Any], with_gradients: bool = True) -> float:
    """The largest relative difference of a result, over values and optionally gradients."""
    rows = list(result["values"].values())
    if with_gradients:
        rows += [row for groups in result["gradients"].values() for row in groups.values()]
    return float(max(row["rel"] for row in rows))


def passes(result: dict[str, Any], tolerance: float, judge_gradients: bool = True) -> bool:
    """Whether nothing differs by more than the tolerance, nothing is left out and the codes are the same."""
    return (
        largest_relative(result, judge_gradients) <= tolerance
        and not any(result["left_out"].values())
        and result["codes_that_differ"] == 0
    )


def run(
    source: Path,
    seeds: int = 3,
    chosen: Sequence[Any] = CASES,
    *,
    load: Callable[[Path], Any] = import_official,
    measuring: Callable[..., tuple[Measured, Measured, Measured | None]] = measure,
    group: Callable[[str], str] = tensor_group,
    settings: dict[str, str] = SETTINGS,
) -> dict[str, Any]:
    """Run the comparisons.

    Args:
        source: checkout of LARA_full.
        seeds: how many draws of weights, batches and noise.
        chosen: which cases.
        load: gives the official modules; this and the next three are those of openpi.py for the other release.
        measuring: runs both sides of a case.
        group: see :func:`compare`.
        settings: what is set alike on both sides, for the report.

    Returns:
        What is written to the results file, without the environment.

    Raises:
        Missing: the official code is not there.
    """
    official = load(source)
    cases = {}
    for case in chosen:
        by_dtype: dict[str, list[dict[str, Any]]] = {"float64": [], "float32": []}
        again: list[dict[str, Any]] = []
        inexact = {"official": 0.0, "ours": 0.0}
        for seed in range(seeds):
            rounding: dict[str, set[str]] = {}
            exact: dict[str, Tensor] = {}
            for dtype, results in by_dtype.items():
                theirs, ours, other = measuring(official, case, seed, getattr(torch, dtype))
                if dtype == "float64":
                    rounding, exact = zeros(theirs), theirs.gradients["lam"]
                else:
                    for side, found in (("official", theirs), ("ours", ours)):
                        inexact[side] = max(inexact[side], distance(found.gradients["lam"], exact, rounding["lam"]))
                results.append(compare(theirs, ours, rounding, group))
                if other is not None and dtype == "float32":
                    again.append(compare(theirs, other, rounding, group))
                gc.collect()  # modules and their hooks refer to each other, and each run has a VGG16 of its own
        entry: dict[str, Any] = {"switch": case.switch, "kinks": case.kinks}
        for dtype, results in by_dtype.items():
            entry[dtype] = merge(results)
            if case.switch:
                entry["lam_gradients_from_official_float64"] = inexact
                judge_gradients = dtype == "float64" or not case.kinks
                entry[dtype]["passes"] = passes(entry[dtype], TOLERANCE[dtype], judge_gradients)
        if again:
            entry["official_against_itself"] = merge(again)
        cases[case.name] = entry
    return {
        "tolerance": TOLERANCE,
        "seeds": seeds,
        "settings": settings,
        "cases": cases,
        "passes": all(entry[dtype]["passes"] for entry in cases.values() if entry["switch"] for dtype in TOLERANCE),
    }


def environment(
    source: Path,
    commit: str | None,
    sources: Sequence[str] = SOURCES,
    packages: Sequence[str] = ("torch", "transformers", "diffusers", "lpips", "numpy"),
) -> dict[str, Any]:
    """Versions, and which official code it was."""
    if commit is None:
        answer = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = answer.stdout.strip() or None
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in sources)).hexdigest()
    return {
        "official": {"repository": "lmy1001/LARA", "folder": source.name, "commit": commit, "sha256": digest,
                     "sha256_of": list(sources)},
        "lara_adapter": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in packages},
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report as text: the largest relative differences of each case, and whether it passes."""
    lines = [f"largest relative difference of {report['seeds']} seeds; settings of both sides:"]
    lines += [f"  {name}: {text}" for name, text in report["settings"].items()]
    for name, case in report["cases"].items():
        lines += ["", f"== {name}"]
        if not case["switch"]:
            lines.append("the random patch order alone (untrained LAM, float32):")
            for title, key in (("ours against theirs", "float32"), ("theirs again", "official_against_itself")):
                values = ", ".join(f"{value} {row['rel']:.1e}" for value, row in case[key]["values"].items())
                lines.append(
                    f"  {title}: {values}; {case[key]['codes_that_differ']} of {case[key]['codes']} codes differ"
                )
            continue
        for dtype, tolerance in report["tolerance"].items():
            result = case[dtype]
            lines.append(f"{dtype} (tolerance {tolerance:.0e}): {'equal' if result['passes'] else 'DIFFERENT'}")
            lines += [f"  {value:30} {row['rel']:8.1e}" for value, row in result["values"].items()]
            for loss, groups in result["gradients"].items():
                worst = ", ".join(f"{group} {row['rel']:.1e}" for group, row in groups.items())
                lines.append(f"  gradient of {loss}: {worst}")
            alone = sorted({name for names in result["left_out"].values() for name in names})
            lines.append(
                f"  on one side only: {', '.join(alone) or 'none'}; codes that differ: {result['codes_that_differ']}"
            )
        rounding = case["lam_gradients_from_official_float64"]
        lines.append(
            f"gradients of lam in float32 against theirs in float64: theirs {rounding['official']:.1e}, "
            f"ours {rounding['ours']:.1e}"
        )
    return "\n".join(lines)


def command(
    arguments: list[str] | None,
    release: str,
    variable: str,
    result: Path,
    compared: Callable[[Path, int], dict[str, Any]],
    described: Callable[[Path, str | None], dict[str, Any]],
) -> int:
    """Compare, print, write: the command line of a release's benchmark.

    Args:
        arguments: those of the command; None: of the process.
        release: its folder in the authors' repository.
        variable: environment variable that names a checkout of it.
        result: where the record goes by default.
        compared: (checkout, seeds) -> the report.
        described: (checkout, its commit or None) -> the environment.

    Returns:
        The exit status: 0 equal, 1 different, 2 without the official code.
    """
    parser = argparse.ArgumentParser(description=f"Parity with the official release ({release})")
    parser.add_argument("--official", type=Path, default=os.environ.get(variable),
                        help=f"checkout of {release}; default: the environment variable {variable}")  # fmt: skip
    parser.add_argument("--commit", help="its commit, where the checkout is not a git work tree")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=result)
    options = parser.parse_args(arguments)
    if options.official is None:
        print(
            "the official code is missing: git clone https://github.com/lmy1001/LARA, then pass --official "
            f"LARA/{release} or set {variable}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    source = Path(options.official).expanduser().resolve()
    try:
        report = compared(source, options.seeds)
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    write_json(options.output, {**report, "environment": described(source, options.commit)})
    return 0 if report["passes"] else 1


def main(arguments: list[str] | None = None) -> int:
    """See :func:`command`."""
    return command(arguments, "LARA_full", "LARA_OFFICIAL_SRC", RESULT, run, environment)


if __name__ == "__main__":
    raise SystemExit(main())
