"""Image encoders: a frozen vision backbone from the Hub, or a small one that is trained with the rest.

Both map images [B, 3, H, W] float in [0, 1] to tokens [B, P, E]: prefix tokens (CLS, registers) first, then the
patches in reading order (left to right, top to bottom).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterFormatError, FrameError, HubError, LaraArgumentError
from ..storage.files import read_json
from ..storage.hub import find_conversion, locate_folder
from .config import LatentActionConfig
from .feature_cache import FeatureCache
from .outside import OutsideTree
from .pixels import resize
from .transformer import TransformerLayer, as_parameter, float32_default, initialize

__all__ = ["FrozenImageEncoder", "PatchEncoder", "build_image_encoder", "describe_image_encoder"]


@float32_default("cpu")  # it moves with the frames, and a meta device would load nothing
def _load_backbone(name: str, revision: str | None) -> nn.Module:
    """Load the vision tower of a Hub id or folder: safetensors only, no remote code, float32, on the CPU.

    `config` of what is returned tells `_name_or_path` and, where it came from the Hub, `_commit_hash`.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoModel
    except ImportError as error:
        raise LaraArgumentError(
            f"image_encoder={name!r} needs transformers (pip install 'lara-adapter[lam]'), which cannot be imported: "
            f"{error}"
        ) from error
    try:
        # The configuration comes first, as plain data: a repository that brings code of its own is refused before
        # transformers asks at the terminal whether to run it, and the weights are then those of the same commit.
        folder = locate_folder(name, revision, ["config.json"], "image encoder")
        content = read_json(folder / "config.json")
        if content.get("auto_map") and content.get("model_type") not in CONFIG_MAPPING:
            raise LaraArgumentError(
                f"image_encoder={name!r}: its model type {content.get('model_type')!r} is code in that repository, and "
                "such code is never run; expected: a vision backbone that the installed transformers has"
            )
        commit = None if Path(name).is_dir() else folder.name
        # A pickle can run code on loading, and torch < 2.6 not even weights_only prevents that (CVE-2025-32434).
        try:
            model = AutoModel.from_pretrained(name, revision=commit, use_safetensors=True)
        except OSError:
            commit = None if commit is None or revision not in (None, "main") else find_conversion(name)
            if commit is None:
                raise
            model = AutoModel.from_pretrained(name, revision=commit, use_safetensors=True)
    except HubError as error:
        raise HubError(f"image_encoder={name!r}: {error}") from error
    except LaraArgumentError:
        raise
    except (AdapterFormatError, OSError, ValueError) as error:
        raise LaraArgumentError(
            f"image_encoder={name!r} (revision {revision!r}) cannot be loaded: {error}. Expected: a Hub id or a local "
            "folder of a vision backbone with safetensors weights; convert pickled weights with save_pretrained"
        ) from error
    # CLIP and SigLIP checkpoints hold a text tower too
    tower = getattr(model, "vision_model", model).float()
    tower.config._name_or_path, tower.config._commit_hash = name, commit
    return tower


def _run(backbone: Any, images: Tensor) -> Tensor:
    """Tokens [B, P, E] of normalised images [B, 3, S, S]."""
    if getattr(backbone.config, "model_type", "") == "vit_mae":
        # HF's ViTMAE shuffles the patches by random noise even when it masks none. Rising noise keeps the order.
        count = backbone.embeddings.patch_embeddings.num_patches
        noise = torch.arange(count, device=images.device, dtype=torch.float32).expand(images.shape[0], -1)
        tokens = backbone(pixel_values=images, noise=noise).last_hidden_state
    else:
        tokens = backbone(pixel_values=images).last_hidden_state
    # convolutional backbones return [B, E, h, w]
    return tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens


def _geometry(backbone: Any, size: int) -> dict[str, int]:
    """The configuration fields that follow from a backbone and the side of its input, found by a dry run."""
    first = next(backbone.parameters())
    with torch.no_grad():
        try:
            tokens = _run(backbone, torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype))
        except (RuntimeError, ValueError) as error:
            raise LaraArgumentError(f"encoder_image_size={size} does not suit the image encoder: {error}") from error
    patch = getattr(backbone.config, "patch_size", None)
    grid = size // patch if isinstance(patch, int) else math.isqrt(tokens.shape[1])
    return {
        "encoder_image_size": size,
        "encoder_patch_size": size // grid,
        "encoder_prefix_tokens": tokens.shape[1] - grid * grid,
        "encoder_width": tokens.shape[2],
    }


def _prepare(backbone: Any) -> nn.Module:
    if getattr(backbone.config, "model_type", "") == "vit_mae":
        backbone.config.mask_ratio = 0.0
    frozen: nn.Module = backbone.requires_grad_(False).eval()
    return frozen


def describe_image_encoder(name: str, revision: str | None = None, image_size: int | None = None) -> dict[str, Any]:
    """The :class:`LatentActionConfig` fields for a backbone: `LatentActionConfig(**describe_image_encoder(name))`.

    Args:
        name: Hub id or local folder.
        revision: commit, tag or branch on the Hub.
        image_size: side in pixels of its input; None: what the backbone's own configuration says.

    Returns:
        image_encoder, image_encoder_revision (the commit, where it is on the Hub) and the four encoder_* fields of its
            geometry. `image_mean` and `image_std` are not in a backbone's weights: the default is ImageNet's; CLIP and
            SigLIP have their own.

    Raises:
        LaraArgumentError: the backbone cannot be loaded, or not be run at that size.
        HubError: it cannot be fetched.
    """
    backbone = _prepare(_load_backbone(name, revision))
    size: Any = image_size or getattr(backbone.config, "image_size", 224)
    if not isinstance(size, int):
        size = size[0]
    commit = getattr(backbone.config, "_commit_hash", None)
    return {"image_encoder": name, "image_encoder_revision": commit or revision, **_geometry(backbone, size)}


def pinned(config: LatentActionConfig, encoder: nn.Module) -> LatentActionConfig:
    """`config` with the commit that a frozen encoder from the Hub was loaded at."""
    loaded = getattr(getattr(encoder, "network", None), "config", None)
    commit = getattr(loaded, "_commit_hash", None)
    # a backbone that was handed over may be another one than the configuration names
    if commit is None or getattr(loaded, "_name_or_path", None) != config.image_encoder:
        return config
    return dataclasses.replace(config, image_encoder_revision=commit)


class FrozenImageEncoder(OutsideTree):
    """A frozen backbone, outside the module tree, always in eval mode and without gradients.

    Args:
        backbone: a vision model of transformers, or any module with `config` that maps `pixel_values` to an output
            with `last_hidden_state`.
        config: the model's settings; the encoder_* fields are checked against the backbone.

    Raises:
        LaraArgumentError: the encoder_* fields do not fit the backbone; the message has the right ones.
    """

    def __init__(self, backbone: nn.Module, config: LatentActionConfig) -> None:
        super().__init__(_prepare(backbone))
        self.config = config
        self.cache: FeatureCache | None = None
        self.narrow: torch.dtype | None = None
        found = _geometry(backbone, config.encoder_size)
        stated = {"encoder_image_size": config.encoder_size, **{k: getattr(config, k) for k in list(found)[1:]}}
        if found != stated:
            raise LaraArgumentError(f"the image encoder has {found}, but the configuration says {stated}")
        # plain attributes: as buffers, a cast of the model would round them
        numbers = torch.tensor([config.image_mean, config.image_std], dtype=torch.float32, device=self.home)
        self.mean, self.std = numbers.view(2, 1, 3, 1, 1).unbind()

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, P, E], without graph, of images [B, 3, H, W] float in [0, 1], which are resized here."""
        # a look-up cannot be part of a compiled graph
        if self.cache is None or torch.compiler.is_compiling():
            return self.compute(images)
        return self.cache.encode(self, images)

    def take(self, features: Tensor, pairs: int) -> tuple[Tensor, ...]:
        """Tokens [B, P, E] of the present frames, of the future ones, and of the difference images where there are any.

        Args:
            features: [B, K, P, E], read from the cache beforehand.
            pairs: B.

        Raises:
            FrameError: another shape, or no floats.
        """
        config = self.config
        expected = [pairs, 3 if config.difference_input else 2, config.encoder_tokens, config.encoder_width]
        if list(features.shape) != expected or not features.is_floating_point():
            raise FrameError(
                f"the cached features are {features.dtype} {list(features.shape)}, but floats {expected} are expected "
                "(pairs, frames of each, tokens, width): they are of other frames, or of another image encoder"
            )
        if self.cache is not None and not torch.compiler.is_compiling():
            self.cache.count_prefetched(expected[0] * expected[1])
        # stored in 16 bits under autocast, where a linear layer reads them and would round them so in any case
        return tuple(tokens.float() for tokens in features.unbind(1))

    def compute(self, images: Tensor) -> Tensor:
        """What :meth:`forward` gives, without looking into the cache."""
        narrow = torch.autocast(images.device.type, self.narrow) if self.narrow else contextlib.nullcontext()
        with torch.no_grad(), narrow:
            return _run(self.network, (resize(images.float(), self.config.encoder_size) - self.mean).div_(self.std))

    def hold_in(self, dtype: torch.dtype) -> None:
        """Hold the matrices in a 16-bit dtype and run under its autocast, where the rest stays float32."""
        assert self.network is not None
        for part in self.network.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(dtype)
        self.narrow = dtype

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)


class PatchEncoder(nn.Module):
    """The small encoder that is trained with the rest and needs no download: patches, positions, some layers."""

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.encoder_width, config.encoder_patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.positions = as_parameter(1, config.encoder_tokens, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, 4, 2 * width, config.layer_norm_eps) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        initialize(self, config.initializer_range)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, P, E], with graph, of images [B, 3, H, W] float in [0, 1], which are resized here."""
        images = resize(images.float(), self.config.encoder_size)
        images = _normalized(images, self.config.image_mean, self.config.image_std)
        tokens = self.patch_embedding(images.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions
        for layer in self.layers:
            tokens, _ = layer(tokens)
        return self.norm(tokens)


def _normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std by channel; numbers and no tensors, which would have to be moved to the device."""
    if len(set(mean)) == len(set(std)) == 1:
        return (images - mean[0]) / std[0]
    return torch.stack([(channel - m) / s for channel, m, s in zip(images.unbind(1), mean, std)], dim=1)


def build_image_encoder(config: LatentActionConfig, backbone: nn.Module | None = None) -> nn.Module:
    """The encoder that `config` asks for, or a frozen `backbone` that is already loaded.

    Raises:
        LaraArgumentError: the backbone cannot be loaded or does not fit.
        HubError: it cannot be fetched.
    """
    if backbone is not None:
        return FrozenImageEncoder(backbone, config)
    if config.image_encoder is None:
        return PatchEncoder(config)
    return FrozenImageEncoder(_load_backbone(config.image_encoder, config.image_encoder_revision), config)
