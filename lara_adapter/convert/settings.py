"""The settings of our latent action model and of the official one, as plain values; class names are ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterFormatError, LaraArgumentError
from ..lam.config import LatentActionConfig
from .state import check_expressible

__all__ = ["config_from_official", "config_to_official"]

_ENCODER = "facebook/vit-mae-large"
_TRANSFORMER = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
                "mlp": "intermediate_size"}  # fmt: skip


class _Reader:
    """Numbers and flags of a nested mapping, each checked and named in errors."""

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, Mapping):
            where = f" has {path}={values!r}" if path else f" is a {type(values).__name__}"
            raise AdapterFormatError(f"the official configuration{where}, but a mapping is expected")
        self.values, self.path = values, path

    def section(self, name: str) -> _Reader:
        """The mapping under `name`."""
        return _Reader(self.values.get(name), f"{self.path}.{name}" if self.path else name)

    def count(self, name: str) -> int:
        """An integer >= 1."""
        value = self.values.get(name)
        valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        self._check(name, value, valid, "not an integer >= 1")
        return value  # type: ignore[return-value]

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self.values.get(name, default)
        self._check(name, value, isinstance(value, int | float) and not isinstance(value, bool), "not a number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        value = self.values.get(name, default)
        self._check(name, value, isinstance(value, bool), "not true or false")
        return bool(value)

    def require(self, name: str, expected: Any, default: Any) -> None:
        """Refuse a setting that our model cannot have."""
        value = self.values.get(name, default)
        self._check(name, value, value == expected, f"but only {expected!r} can be converted")

    def _check(self, name: str, value: Any, valid: bool, problem: str) -> None:
        if not valid:
            where = f"{self.path}.{name}" if self.path else name
            raise AdapterFormatError(f"the official configuration has {where}={value!r}, {problem}")


def config_from_official(values: Mapping[str, Any], **changes: Any) -> LatentActionConfig:
    """Our settings for an official tokenizer configuration, `config.yaml` or `config.json` as plain values.

    The official tokenizer normalises nothing: it was pre-trained on frames in [0, 1], and trained with the policy on
    ImageNet-normalised ones. `image_mean` is 0 and `image_std` 1 here, as in the pre-training.

    Args:
        values: the mapping, or one that holds it under "config".
        **changes: fields of :class:`LatentActionConfig` to change, above all `image_encoder` (the official file names a
            local path of its author; default: the paper's) and `image_encoder_revision`.

    Raises:
        AdapterFormatError: a number is missing, or a setting has no counterpart; the message names it.
    """
    top = _Reader(values, "")
    if isinstance(values.get("config"), Mapping):
        top = _Reader(values["config"], "")
    former, decoder = top.section("m_former_config").section("config"), top.section("decoder_config").section("config")
    quantizer = top.section("vector_quantizer_config")
    for name in ("commit_loss_w", "recon_loss_w"):
        top.require(name, 1.0, 1.0)
    # use_abs_recons_loss is not checked: LARA's release never reads it
    top.require("hidden_state_decoder_config", None, None)
    top.section("m_former_config").require("add_pooling_layer", False, True)
    quantizer.require("remap", None, None)
    for part in (former, decoder):
        part.require("hidden_act", "gelu", "gelu")
        part.require("qkv_bias", True, True)
        for name in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
            part.require(name, 0.0, 0.0)
    decoder.require("num_channels", 3, 3)
    decoder.require("is_io_hidden_states", False, False)
    decoder.require("query_num", former.count("query_num"), None)
    decoder.require("encoder_stride", decoder.count("patch_size"), None)
    decoder.require("layer_norm_eps", former.number("layer_norm_eps", 1e-12), 1e-12)
    quantizer.require("e_dim", top.values.get("codebook_dim", 32), None)
    size = decoder.count("image_size")
    decoder.require("num_patches", (size // decoder.count("patch_size")) ** 2, None)
    grid, prefix = _grid(former.count("num_patches"))
    fields: dict[str, Any] = {
        "image_size": size,
        "image_encoder": _ENCODER,
        "image_mean": (0.0, 0.0, 0.0),
        "image_std": (1.0, 1.0, 1.0),
        "encoder_patch_size": size // grid,
        "encoder_prefix_tokens": prefix,
        "encoder_width": former.count("input_hidden_size"),
        "queries": former.count("query_num"),
        "latent_dim": quantizer.count("e_dim"),
        **{f"idm_{name}": former.count(official) for name, official in _TRANSFORMER.items()},
        "legacy_token_types": former.flag("legacy", True),
        **{f"fdm_{name}": decoder.count(official) for name, official in _TRANSFORMER.items()},
        "fdm_patch_size": decoder.count("patch_size"),
        "fusion": decoder.values.get("query_fusion_mode", "add"),
        "mask_token": decoder.flag("use_mask_token", False),
        "codebook_size": quantizer.count("n_e"),
        "commitment_weight": quantizer.number("beta"),
        "legacy_commitment": quantizer.flag("legacy", True),
        "perceptual_weight": top.number("perceptual_loss_w", 1.0),
        "layer_norm_eps": former.number("layer_norm_eps", 1e-12),
        "initializer_range": former.number("initializer_range", 0.02),
    }
    try:
        return LatentActionConfig(**{**fields, **changes})
    except LaraArgumentError as error:
        raise AdapterFormatError(f"the official configuration is not valid: {error}") from error


def _grid(tokens: int) -> tuple[int, int]:
    """Patches per side and prefix tokens of an encoder that gives `tokens` per frame."""
    # no prefix token first: a square plus one is never a square
    for prefix in range(9):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side, prefix
    raise AdapterFormatError(
        f"the official configuration has m_former_config.config.num_patches={tokens}, which is not a square of patches "
        "with up to 8 tokens in front"
    )


def config_to_official(config: LatentActionConfig, image_encoder: str | None = None) -> dict[str, Any]:
    """The official tokenizer configuration of ours, as JSON-able values; its loader needs the class names in it.

    Args:
        config: settings of a model that :func:`state_to_official` can convert.
        image_encoder: folder or Hub id of the ViT-MAE; None: `config.image_encoder`.

    Raises:
        AdapterFormatError: the model has a part that the official one does not have.
    """
    check_expressible(config)
    if config.reconstruction_over_copy:
        raise AdapterFormatError("the official loss does not have reconstruction_over_copy")
    c, moto = config, "moto.latent_motion_tokenizer.model"
    shared = {
        "_target_": "transformers.ViTConfig",
        "query_num": c.queries,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "initializer_range": c.initializer_range,
        "layer_norm_eps": c.layer_norm_eps,
        "qkv_bias": True,
    }
    return {
        "codebook_dim": c.latent_dim,
        "commit_loss_w": 1.0,
        "recon_loss_w": 1.0,
        "perceptual_loss_w": c.perceptual_weight,
        "image_encoder_config": {
            "_target_": "transformers.ViTMAEModel.from_pretrained",
            "pretrained_model_name_or_path": image_encoder or c.image_encoder,
        },
        "m_former_config": {
            "_target_": f"{moto}.m_former.MFormer",
            "add_pooling_layer": False,
            "config": {
                **shared,
                "input_hidden_size": c.encoder_width,
                "num_patches": c.encoder_tokens,
                **{official: getattr(c, f"idm_{name}") for name, official in _TRANSFORMER.items()},
                "legacy": c.legacy_token_types,
            },
        },
        "vector_quantizer_config": {
            "_target_": f"{moto}.vector_quantizer.VectorQuantizer2",
            "n_e": c.codebook_size,
            "e_dim": c.latent_dim,
            "beta": c.commitment_weight,
            "remap": None,
            "sane_index_shape": True,
            "legacy": c.legacy_commitment,
        },
        "decoder_config": {
            "_target_": f"{moto}.latent_motion_decoder.LatentMotionDecoder",
            "config": {
                **shared,
                **{official: getattr(c, f"fdm_{name}") for name, official in _TRANSFORMER.items()},
                "image_size": c.image_size,
                "patch_size": c.fdm_patch_size,
                "num_channels": 3,
                "encoder_stride": c.fdm_patch_size,
                "num_patches": (c.image_size // c.fdm_patch_size) ** 2,
                "query_fusion_mode": c.fusion,
                "use_mask_token": c.mask_token,
            },
        },
    }
