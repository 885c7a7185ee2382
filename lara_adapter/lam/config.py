"""The settings of a latent action model, as plain data: numbers, flags and two strings.

A configuration travels in `config.json` and may be untrusted, so it never names a class, a function
or an import: the only string that leads anywhere is the image encoder's Hub id or folder, which is
loaded as safetensors and without remote code.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterFormatError, LaraArgumentError
from ..storage.files import read_json, write_json

__all__ = ["FORMAT", "ORIGIN", "SCHEMA_VERSION", "LatentActionConfig"]

logger = logging.getLogger(__name__)

FORMAT = "lara_adapter.latent_action_model"
SCHEMA_VERSION = 1
ORIGIN = "origin"  # key of config.json beside the settings: the repository and commit that a model was trained on from

_CHOICES = {"fusion": ("add", "concat")}
_POSITIVE = {"image_std", "layer_norm_eps", "initializer_range", "idm_position_range", "fdm_position_range"}
_MAY_BE_ZERO = {"encoder_layers", "encoder_prefix_tokens", "vq_warmup_steps", "vq_revive_every"}


@dataclass(frozen=True, kw_only=True)
class LatentActionConfig:
    """Settings of a :class:`~lara_adapter.lam.LatentActionModel`; the defaults are the paper's.

    Attributes:
        image_size: side in pixels of the square frames that are reconstructed; other frames are resized to it.
        image_encoder: Hub id or local folder of a frozen vision backbone, or None for the small trainable encoder.
        image_encoder_revision: commit, tag or branch of `image_encoder` on the Hub; in a built model it is the commit.
        image_mean: per-channel mean that the encoder's input is normalised with, in [0, 1].
        image_std: per-channel standard deviation, > 0.
        encoder_image_size: side in pixels of the encoder's input; None: `image_size`.
        encoder_patch_size: pixels per side that one encoder token stands for.
        encoder_prefix_tokens: tokens before the patches (CLS, registers); 0 for the own encoder.
        encoder_width: width of the encoder's tokens.
        encoder_layers: transformer layers of the own encoder; unused with a frozen one.
        queries: N, latent tokens per pair of frames.
        latent_dim: D, width of one latent token.
        idm_width: width of the inverse dynamics model (M-Former); likewise `idm_layers`, `idm_heads`, `idm_mlp`.
        legacy_token_types: both frames carry token type 0, as in the official release; False: types 0 and 1.
        difference_input: the inverse dynamics model also reads the encoding of the difference image.
        normalize_latent: non-affine LayerNorm on each latent token before it is quantised.
        subtract_still: the latent of (I_t, I_t) is subtracted, so that a pair in which nothing moves is the zero vector
            and what z says of the present frame alone is gone; the inverse dynamics model then runs on twice the rows.
        fdm_width: width of the forward dynamics model; likewise `fdm_layers`, `fdm_heads`, `fdm_mlp`.
        fdm_patch_size: pixels per side of its patches; divides `image_size`.
        fusion: "add" (one vector of all N tokens is added to each patch) or "concat" (N tokens in the sequence).
        mask_token: one learnt token per output patch is appended and decoded, as the release allows.
        residual: the output is added to the present frame, and its last layer starts at zero.
        codebook_size: K, entries of the codebook.
        commitment_weight: beta of LARA, Eq. 3.
        legacy_commitment: beta weighs the codebook term instead, as the official code does by an old mistake.
        vq_warmup_steps: training steps that pass z on unquantised; the codebook then starts from data.
        vq_init_from_data: start the codebook from the first latents even without warm-up.
        vq_revive_every: steps between two revivals of unused codes; 0: never.
        vq_usage_decay: decay per step of the running usage of each code, in [0, 1).
        reconstruction_over_copy: divide the reconstruction loss by that of copying the present frame.
        perceptual_weight: weight of the LPIPS term; 0: off.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the truncated normal that weights start from.
        idm_position_range: that of the inverse dynamics model's positions.
        fdm_position_range: that of the forward dynamics model's positions.
        gap: C that it learnt with on video, in frames ("16") or seconds ("0.5s"), if known; nothing is built from it.
        labelled_by: fingerprint of the demonstrations whose actions it learnt from, if it did (`lara train-lam --actions`);
            see :func:`~lara_adapter.lam.identity.action_fingerprint`. Nothing is built from it.

    Raises:
        LaraArgumentError: a value has the wrong type or lies outside its range; the message names the field.
    """

    image_size: int = 224
    image_encoder: str | None = "facebook/vit-mae-large"
    image_encoder_revision: str | None = None
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    encoder_image_size: int | None = None
    encoder_patch_size: int = 16
    encoder_prefix_tokens: int = 1
    encoder_width: int = 1024
    encoder_layers: int = 0
    queries: int = 8
    latent_dim: int = 32
    idm_width: int = 768
    idm_layers: int = 4
    idm_heads: int = 12
    idm_mlp: int = 3072
    legacy_token_types: bool = False
    difference_input: bool = False
    normalize_latent: bool = False
    subtract_still: bool = False
    fdm_width: int = 768
    fdm_layers: int = 12
    fdm_heads: int = 12
    fdm_mlp: int = 3072
    fdm_patch_size: int = 16
    fusion: str = "add"
    mask_token: bool = False
    residual: bool = False
    codebook_size: int = 128
    commitment_weight: float = 0.25
    legacy_commitment: bool = False
    vq_warmup_steps: int = 0
    vq_init_from_data: bool = False
    vq_revive_every: int = 0
    vq_usage_decay: float = 0.95
    reconstruction_over_copy: bool = False
    perceptual_weight: float = 1.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    idm_position_range: float = 0.02
    fdm_position_range: float = 0.02
    gap: str | None = None
    labelled_by: str | None = None

    @classmethod
    def paper(cls, **changes: Any) -> LatentActionConfig:
        """The paper's LAM, with `changes`: ViT-MAE-large, 4-layer M-Former, 8 x 32 latent, 128 codes, LPIPS."""
        return cls(**changes)

    @classmethod
    def tiny(cls, **changes: Any) -> LatentActionConfig:
        """A LAM that trains from scratch on one CPU core: 64 px, own encoder, no download.

        Small models on small motions do not start to learn by the paper's recipe: the codebook's scale collapses and
        the copy of the present frame is hard to beat. Hence the LayerNorm on z, the warm-up without quantisation, the
        revived codes, the residual decoder, the difference image and the loss relative to the copy.

        Args:
            **changes: fields to set otherwise; `vq_warmup_steps` should be about a quarter of the planned steps.
        """
        # Width 96 with ViT's initializer_range of 0.02 starts with a latent that is the same for every pair, and takes
        # hundreds of steps to leave it. Positions must not drown in the patches: of the IDM, or z cannot say where
        # something moved; of the FDM, or it settles for a blur that ignores z (and z then dies).
        tiny: dict[str, Any] = {
            "image_size": 64, "image_encoder": None, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
            "encoder_patch_size": 8, "encoder_prefix_tokens": 0, "encoder_width": 64, "encoder_layers": 0,
            "idm_width": 96, "idm_layers": 1, "idm_heads": 4, "idm_mlp": 192,
            "difference_input": True, "normalize_latent": True,
            "fdm_width": 96, "fdm_layers": 2, "fdm_heads": 4, "fdm_mlp": 192, "fdm_patch_size": 8,
            "fusion": "concat", "residual": True, "vq_warmup_steps": 150, "vq_revive_every": 50,
            "reconstruction_over_copy": True, "perceptual_weight": 0.0, "layer_norm_eps": 1e-6,
            "initializer_range": 0.1, "idm_position_range": 0.8, "fdm_position_range": 0.5,
        }  # fmt: skip
        return cls(**{**tiny, **changes})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, self._checked(field.name, str(field.type), getattr(self, field.name)))
        for part in ("idm", "fdm"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads:
                raise LaraArgumentError(f"{part}_heads={heads} does not divide {part}_width={width}")
        for size, patch in (("image_size", "fdm_patch_size"), ("encoder_size", "encoder_patch_size")):
            if getattr(self, size) % getattr(self, patch):
                raise LaraArgumentError(f"{patch}={getattr(self, patch)} does not divide {size}={getattr(self, size)}")
        if self.image_encoder is None and self.encoder_prefix_tokens:
            raise LaraArgumentError(
                f"encoder_prefix_tokens={self.encoder_prefix_tokens}, but the own encoder (image_encoder=None) has none"
            )

    @staticmethod
    def _checked(name: str, kind: str, value: Any) -> Any:
        """Return `value` in its normal form, or raise LaraArgumentError naming the field."""

        def refuse(expected: str) -> LaraArgumentError:
            return LaraArgumentError(f"LatentActionConfig: {name}={value!r}, but {expected} is expected")

        if value is None and "None" in kind:
            return None
        if kind == "bool":
            if not isinstance(value, bool):
                raise refuse("True or False")
        elif kind.startswith("int"):
            least = 0 if name in _MAY_BE_ZERO else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
                raise refuse(f"an integer >= {least}")
        elif kind.startswith("str"):
            choices = _CHOICES.get(name)
            if not isinstance(value, str) or not value or (choices and value not in choices):
                raise refuse(f"one of {choices}" if choices else "a non-empty string")
        else:
            items = tuple(value) if kind.startswith("tuple") and isinstance(value, tuple | list) else (value,)
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in items)
            if len(items) != (3 if kind.startswith("tuple") else 1) or not numbers:
                raise refuse("three finite numbers" if kind.startswith("tuple") else "a finite number")
            if min(items) < 0 or (name in _POSITIVE and min(items) == 0):
                raise refuse("a positive number (or zero, where that switches something off)")
            if name == "vq_usage_decay" and value >= 1:
                raise refuse("a number in [0, 1)")
            return tuple(map(float, items)) if kind.startswith("tuple") else float(value)
        return value

    @property
    def encoder_size(self) -> int:
        """Side in pixels of the image encoder's input."""
        return self.image_size if self.encoder_image_size is None else self.encoder_image_size

    @property
    def encoder_grid(self) -> int:
        """Patches per side that the image encoder returns."""
        return self.encoder_size // self.encoder_patch_size

    @property
    def encoder_tokens(self) -> int:
        """Tokens per frame that the image encoder returns, prefix included."""
        return self.encoder_prefix_tokens + self.encoder_grid**2

    @property
    def reads_nothing(self) -> bool:
        """Whether the inverse dynamics model reads the difference image of two equal frames, grey all over."""
        return self.difference_input and self.subtract_still

    def to_dict(self) -> dict[str, Any]:
        """Every field, and the format and schema version, as JSON-able values."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], source: str | os.PathLike[str] = "configuration"
    ) -> LatentActionConfig:
        """Read what :meth:`to_dict` wrote; unknown keys are ignored with a warning, never interpreted.

        Args:
            content: field to value, with "format" and "schema_version"; absent fields take their default.
            source: where it comes from, for messages.

        Raises:
            AdapterFormatError: it is not a configuration of ours, or was written by a newer version.
            LaraArgumentError: a value is outside its range.
        """
        version = content.get("schema_version")
        if content.get("format") != FORMAT or isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise AdapterFormatError(
                f"{source} is not a latent action model of lara_adapter: format={content.get('format')!r}, "
                f"schema_version={version!r}, but {FORMAT!r} and an integer are expected"
            )
        if version > SCHEMA_VERSION:
            raise AdapterFormatError(
                f"{source} has schema_version {version}, newer than {SCHEMA_VERSION}; upgrade lara-adapter to read it"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in content if key not in known | {"format", "schema_version", ORIGIN})
        if unknown:
            logger.warning("%s: unknown keys ignored: %s", source, ", ".join(unknown))
        return cls(**{key: value for key, value in content.items() if key in known})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatentActionConfig:
        """Read a JSON file; raises as :meth:`from_dict`, and AdapterFormatError if it is missing or no JSON."""
        return cls.from_dict(read_json(path), path)
