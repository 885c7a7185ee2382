"""Parity with the official release for openpi: their PI0Pytorch with LARA against the same policy with `attach`.

    make test-openpi                                     # makes the environment, .venv-openpi
    git clone https://github.com/lmy1001/LARA
    .venv-openpi/bin/python -m pip install hydra-core omegaconf lpips
    .venv-openpi/bin/python -m benchmarks.parity.openpi --official LARA/LARA_posttrain_openpi

official.py for the second release, LARA_posttrain_openpi; differences are measured, judged and printed as
there. The official code is imported and never changed. Their openpi is used on both sides: with
`use_latent_motion_queries=True`, and without it and with lara_adapter.integrations.openpi. Both get the same weights,
flow noise, times, augmentations and frames; the tokenizer's weights go through `lara_adapter.convert`. The total is
`losses.mean() + 0.01 * latent_loss + 0.01 * vae_loss`, as in their scripts/train_pytorch.py; ours is `.mean()` of what the
attached policy returns.

ONE SWITCH is needed on their side, the patch order of ViT-MAE; and one on ours: this release takes no gradient of the
perceptual loss, so ours is computed under no_grad too. Stand-ins, the same on both sides: tiny sizes (pictures of 64
pixels in place of 224, by the default argument of openpi's preprocessing), random weights, and LPIPS as there.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from lara_adapter.integrations.openpi import OpenpiLaraSettings, attach
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.checkout import Missing, add_checkout
from benchmarks.parity import official as parity
from benchmarks.parity import sides
from benchmarks.parity.differences import Measured
from benchmarks.parity.sides import IMAGE, PATCH, Case
from examples import openpi_tiny
from lara_adapter import LatentActionConfig

RESULT = RESULTS / "parity_openpi.json"
SOURCES = (
    "src/openpi/models_pytorch/pi0_pytorch.py",
    "src/openpi/models_pytorch/gemma_pytorch.py",
    "src/openpi/models_pytorch/preprocessing_pytorch.py",
    "scripts/train_pytorch.py",
    *sides.TOKENIZER_SOURCES,
)
PACKAGES = ("torch", "rlinf-transformer-openpi", "lpips", "numpy", "jax", "flax")
BATCH = sides.BATCH
WEIGHT = 0.01  # of both terms, as in the release's config pi05_lara_libero


@dataclass(frozen=True)
class PiCase(Case):
    """A comparison; frames are ImageNet-normalised throughout, as the release's model does itself.

    pi05: pi0.5, or pi0.
    """

    normalized: bool = True
    pi05: bool = True


CASES = (
    PiCase("pi0.5, release"),
    PiCase("pi0.5, release, perceptual off", changes={"perceptual_weight": 0.0}),
    PiCase("pi0, release", pi05=False),
    PiCase("pi0.5, release, switch OFF", switch=False),
)

SETTINGS = {
    "attach": 'layer=-1, after_norm=True, token="last", projector="linear", alignment="cosine", align_weight=0.01, '
    "lam_weight=0.01",
    "after_norm": "True: the release aligns the state after the final norm of the action expert",
    "legacy_token_types, legacy_commitment": "True, as in the release",
    "image_mean, image_std": "0 and 1, and ImageNet-normalised frames in front of both LAMs, which is what the "
    "release does",
    "frames": "one pair, one view, all valid: the release has no valid flags",
    "perceptual": "without a gradient on both sides: the release computes it under no_grad",
    "patch order": "theirs: noise=arange to ViTMAEModel (the one switch); ours always has the reading order",
}


# ---------------------------------------------------------------------- the official side


def import_official(source: Path) -> types.SimpleNamespace:
    """The official modules, from a checkout of LARA_posttrain_openpi.

    Raises:
        Missing: no such checkout, a package that it needs cannot be imported, or another openpi is imported already.
    """
    source = add_checkout(source, "LARA_posttrain_openpi", contains=SOURCES[0], folders=("src", ""))
    try:
        import lpips
        import openpi.models_pytorch.pi0_pytorch as models
        import openpi.models_pytorch.preprocessing_pytorch as preprocessing
        import transformers
    except ImportError as error:
        raise Missing(f"the official code in {source} cannot be imported: {error}") from error
    if not Path(models.__file__).is_relative_to(source):
        raise Missing(f"another openpi is imported already, from {models.__file__}")
    return types.SimpleNamespace(
        source=source, models=models, preprocessing=preprocessing, lpips=lpips, transformers=transformers
    )


@contextlib.contextmanager
def small_pictures(official: types.SimpleNamespace) -> Iterator[None]:
    """Within this context openpi's preprocessing makes pictures of 64 pixels."""
    defaults = official.preprocessing.preprocess_observation_pytorch.__kwdefaults__
    before = defaults["image_resolution"]
    defaults["image_resolution"] = (IMAGE, IMAGE)
    try:
        yield
    finally:
        defaults["image_resolution"] = before


def build(official: types.SimpleNamespace, pi05: bool, **changes: Any) -> Any:
    """A tiny PI0Pytorch of the official code."""
    with openpi_tiny.tiny_models(IMAGE, PATCH):
        return official.models.PI0Pytorch(openpi_tiny.model_config(pi05, **changes))


def official_policy(official: types.SimpleNamespace, case: PiCase, config: LatentActionConfig, seed: int) -> Any:
    """Their policy with its tokenizer, put there by their loader from a checkpoint that ours was written to."""
    with sides.official_checkpoint(official, config, seed, case.kinks) as (folder, encoder_folder, written):
        policy = build(
            official, case.pi05, use_latent_motion_queries=True, latent_motion_tokenizer_path=str(folder),
            latent_motion_image_encoder_path=str(encoder_folder),
            latent_motion_num_tokens=config.queries, latent_motion_token_dim=config.latent_dim,
        )  # fmt: skip
    held = {name: p for name, p in policy.named_parameters() if not name.startswith("latent_motion_tokenizer.")}
    sides.randomize(nn.ParameterDict({name.replace(".", "/"): p for name, p in held.items()}), seed)
    sides.randomize_tokenizer(policy.latent_motion_tokenizer, written, seed)
    return policy


# ---------------------------------------------------------------------- one run of each


def make_batch(seed: int, dtype: torch.dtype) -> tuple[types.SimpleNamespace, Tensor, Tensor, Tensor]:
    """An observation with both sides' frames, actions [B, H, 32], flow noise alike and times [B]."""
    g = torch.Generator().manual_seed(seed)
    frames = sides.make_batch(seed, dtype)["frames"]
    others = torch.rand(BATCH, 2, 3, IMAGE, IMAGE, generator=g).to(dtype) * 2 - 1
    images = {
        "base_0_rgb": frames[:, 0] * 2 - 1, "left_wrist_0_rgb": others[:, 0], "right_wrist_0_rgb": others[:, 1],
        "base_0_rgb_future": frames[:, 1] * 2 - 1,
    }  # fmt: skip
    observation = types.SimpleNamespace(
        images=images, image_masks={name: torch.ones(BATCH, dtype=torch.bool) for name in images},
        state=torch.randn(BATCH, 32, generator=g).to(dtype),
        tokenized_prompt=torch.randint(0, 200, (BATCH, 12), generator=g),
        tokenized_prompt_mask=torch.arange(12).expand(BATCH, -1) < 9, token_ar_mask=None, token_loss_mask=None,
        lara_frames=torch.stack([(images[name] + 1) / 2 for name in ("base_0_rgb", "base_0_rgb_future")], dim=1),
        lara_frames_valid=torch.ones(BATCH, dtype=torch.bool),
    )  # fmt: skip
    actions, noise = torch.randn(2, BATCH, openpi_tiny.HORIZON, 32, generator=g).to(dtype)
    return observation, actions, noise, torch.rand(BATCH, generator=g).to(dtype) * 0.999 + 0.001


@contextlib.contextmanager
def keep_wide(dtype: torch.dtype) -> Iterator[None]:
    """In float64: nothing goes through float32 on its way, `.to(dtype=torch.float32)` included."""
    if dtype != torch.float64:
        yield
        return
    to, sample = Tensor.to, F.grid_sample

    def wide_sample(pictures: Tensor, grid: Tensor, **kwargs: Any) -> Tensor:
        return sample(pictures, grid.to(pictures.dtype), **kwargs)  # of openpi's augmentation: its grid is float32

    def wide_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrow = torch.float32 in args or kwargs.get("dtype") == torch.float32
        return tensor if narrow and tensor.dtype == torch.float64 else to(tensor, *args, **kwargs)

    Tensor.to, F.grid_sample = wide_to, wide_sample  # type: ignore[method-assign, assignment]
    try:
        with sides.keep_float64():
            yield
    finally:
        Tensor.to, F.grid_sample = to, sample  # type: ignore[method-assign]


def run_official(policy: Any, batch: tuple[Any, ...], case: PiCase, seed: int, order: int | None = None) -> Measured:
    """One training forward of the official model, and the gradients; `order`: seed of the patch order."""
    tokenizer = policy.latent_motion_tokenizer
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, module in (
            ("lam", tokenizer), ("quantizer", tokenizer.vector_quantizer), ("decoder", tokenizer.decoder),
        )
    ]  # fmt: skip
    if case.switch:
        handles.append(sides.set_patch_order(tokenizer.image_encoder))
    if order is not None:
        handles.append(tokenizer.register_forward_pre_hook(lambda m, a: (torch.manual_seed(order), None)[1]))
    torch.manual_seed(seed)
    action, latent_loss, vae_loss, _ = policy(*batch)
    for handle in handles:
        handle.remove()
    losses = {"action": action.mean(), "align": latent_loss, "lam": vae_loss}
    losses["total"] = losses["action"] + WEIGHT * latent_loss + WEIGHT * vae_loss
    found = seen["lam"]
    values = {
        "lam: reconstruction": found.recons_loss, "lam: codebook and commitment": seen["quantizer"][2],
        "lam: perceptual": found.perceptual_loss, "predicted frame": seen["decoder"],
    }  # fmt: skip
    return parity.their_measured(policy, losses, values, found)


def run_ours(policy: Any, lara: Any, batch: tuple[Any, ...], config: LatentActionConfig, seed: int) -> Measured:
    """One training forward of the policy with LARA attached, and the gradients under official names."""
    seen: dict[str, Any] = {}
    handles = [
        policy.action_out_proj.register_forward_hook(lambda m, a, out: seen.setdefault("velocity", out)),
        lara.lam.register_forward_hook(lambda m, a, out: seen.update(lam=out)),
    ]
    observation, actions, noise, time = batch
    torch.manual_seed(seed)
    output = policy(observation, actions, noise, time)
    for handle in handles:
        handle.remove()
    action = F.mse_loss(noise - actions, seen["velocity"])
    losses = {"action": action, "align": lara.losses.align, "lam": lara.losses.lam, "total": output.mean()}
    template = lara.lam.inner.state_dict()

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = parity.official_names(tensors, template, config)
        return {name.removeprefix("action_head."): tensor for name, tensor in renamed.items()}

    return parity.our_measured(policy, losses, seen["lam"], config, named)


def widened(policy: Any, dtype: torch.dtype) -> Any:
    """The policy in `dtype`; the frequencies of its rotary embeddings stay float32, as their positions."""
    policy.to(dtype)
    for module in policy.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.to(torch.float32)
    return policy


def measure(
    official: types.SimpleNamespace, case: PiCase, seed: int, dtype: torch.dtype
) -> tuple[Measured, Measured, Measured | None]:
    """Build both sides from the same weights and run them; as :func:`official.measure`."""
    config = sides.lam_config(case)
    torch.manual_seed(seed)
    theirs = widened(official_policy(official, case, config, seed), dtype).train()
    tokenizer = theirs.latent_motion_tokenizer
    ours = build(official, case.pi05)
    own = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    widened(ours, dtype).load_state_dict(own, strict=True)
    lam = sides.converted(tokenizer, config, dtype)
    if lam.perceptual is not None:
        lam.perceptual.forward = torch.no_grad()(lam.perceptual.forward)  # as this release has it
    chosen = OpenpiLaraSettings(
        after_norm=True, token="last", projector="linear", align_weight=WEIGHT, lam_weight=WEIGHT
    )
    lara = attach(ours.train(), sides.NormalizedFrames(lam), chosen)
    lara.projector.to(dtype).load_state_dict(theirs.pred_latent_motion_head.state_dict())
    if dtype == torch.float64:
        lara.to(dtype)
    batch = make_batch(seed, dtype)
    with keep_wide(dtype), small_pictures(official):
        reference = run_official(theirs, batch, case, seed)
        result = run_ours(ours, lara, batch, config, seed)
        again = None if case.switch else run_official(theirs, batch, case, seed, order=seed + 1000)
    return reference, result, again


def tensor_group(name: str) -> str:
    """The row of the table that a tensor belongs to."""
    for prefix, group in (
        ("paligemma_with_expert.paligemma.", "VLM"),
        ("paligemma_with_expert.gemma_expert.", "action expert"),
        ("pred_latent_motion_head.", "projector"),
        ("latent_motion_tokenizer.m_former.", "LAM: M-Former"),
        ("latent_motion_tokenizer.vector_quantizer.", "LAM: codebook"),
        ("latent_motion_tokenizer.vq_", "LAM: resamplers"),
        ("latent_motion_tokenizer.decoder.", "LAM: decoder"),
    ):
        if name.startswith(prefix):
            return group
    return "action projections"


def run(source: Path, seeds: int = 3, chosen: tuple[PiCase, ...] = CASES) -> dict[str, Any]:
    """As :func:`official.run`, for this release."""
    return parity.run(
        source, seeds, chosen, load=import_official, measuring=measure, group=tensor_group, settings=SETTINGS
    )


def environment(source: Path, commit: str | None) -> dict[str, Any]:
    """As :func:`official.environment`, for this release."""
    return parity.environment(source, commit, SOURCES, PACKAGES)


def main(arguments: list[str] | None = None) -> int:
    """See :func:`official.command`."""
    return parity.command(
        arguments, "LARA_posttrain_openpi", "LARA_OFFICIAL_OPENPI_SRC", RESULT, run, environment
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
