"""The two layouts of the authors' settings, read strictly: LARA's tokenizer and Moto's.

They differ in names: LARA has `m_former_config`, Moto `m_former`, and so on. Class names (`_target_`) are compared with a
list and never imported. A key that is neither used nor known to have no effect is refused: it may change what the model
computes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AdapterFormatError, LaraArgumentError

__all__ = ["OfficialSettings", "choose_encoder", "parse", "to_moto", "with_moto_names"]

_PARTS = ("image_encoder", "m_former", "vector_quantizer", "decoder", "hidden_state_decoder")
_MODULES = {"official": "moto.latent_motion_tokenizer.model", "moto": "latent_motion_tokenizer.src.models"}
_TOKENIZER = "latent_motion_tokenizer.LatentMotionTokenizer"
_CLASSES = {
    "m_former": "m_former.MFormer",
    "vector_quantizer": "vector_quantizer.VectorQuantizer2",
    "decoder": "latent_motion_decoder.LatentMotionDecoder",
}
_VIT_MAE = "transformers.ViTMAEModel.from_pretrained"
_VIT_CONFIG = "transformers.ViTConfig"

_HYDRA = {"_target_", "_recursive_", "_convert_"}
_OURS = "written by transformers beside the settings"
_NO_EFFECT = {
    "architectures": _OURS, "model_type": _OURS, "torch_dtype": _OURS, "dtype": _OURS, "compute_dtype": _OURS,
    "transformers_version": _OURS, "_name_or_path": _OURS, "_attn_implementation_autoset": _OURS,
    "recon_hidden_loss_w": "weight of a decoder of hidden states, which is not set",
    "use_abs_recons_loss": "the official release never reads it; False in Moto's",
}  # fmt: skip
_TOP = {"codebook_dim", "commit_loss_w", "recon_loss_w", "perceptual_loss_w"}
_VIT = {
    "query_num", "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size",
    "initializer_range", "intermediate_size", "layer_norm_eps", "num_attention_heads", "num_hidden_layers",
    "qkv_bias", "num_patches", "model_type",
}  # fmt: skip
_USED = {
    "image_encoder": {"pretrained_model_name_or_path", "from_tf"},
    "m_former": {"add_pooling_layer", "config"},
    "m_former.config": _VIT | {"input_hidden_size", "legacy"},
    "vector_quantizer": {"n_e", "e_dim", "beta", "remap", "unknown_index", "sane_index_shape", "legacy"},
    "decoder": {"config"},
    "decoder.config": _VIT
    | {"image_size", "num_channels", "patch_size", "encoder_stride", "query_fusion_mode", "use_mask_token",
       "is_io_hidden_states"},
}  # fmt: skip
# ViTConfig fields that the official code does not read: the M-Former has no pixels
_NOT_READ = {"image_size", "patch_size", "num_channels", "encoder_stride", "pooler_output_size", "pooler_act"}

# the ViT-MAE models of the Hub by width, for settings that name a local folder of their author
_PUBLISHED = {768: "facebook/vit-mae-base", 1024: "facebook/vit-mae-large", 1280: "facebook/vit-mae-huge"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class OfficialSettings(NamedTuple):
    """Settings of an official tokenizer.

    layout: "official" or "moto".
    values: in the official layout, for :func:`config_from_official`.
    image_encoder: Hub id or path of the image encoder, or None.
    dropped: key to the reason why it has no effect.
    """

    layout: str
    values: dict[str, Any]
    image_encoder: str | None
    dropped: dict[str, str]


def parse(values: Mapping[str, Any], path: Path, ignore: Collection[str] = ()) -> OfficialSettings:
    """Check every setting of an official tokenizer, and bring them into one layout.

    Args:
        values: content of the file.
        path: the file, for messages.
        ignore: dotted paths of unknown keys to ignore.

    Raises:
        LaraArgumentError: a key to ignore is missing or known.
        AdapterFormatError: not such settings, an unknown class or key, or a part that our model cannot have; file and key
            are named.
    """
    nested = isinstance(values.get("config"), Mapping)
    top: Mapping[str, Any] = values["config"] if nested else values
    if "m_former_config" in top:
        layout, suffix = "official", "_config"
    elif "m_former" in top and not nested:
        layout, suffix = "moto", ""
    else:
        raise AdapterFormatError(
            f"{path} does not hold settings of a latent motion tokenizer: neither m_former_config (LARA's) nor m_former "
            f"(Moto's) is among its keys {sorted(map(str, values))[:20]}"
        )
    _check_labels(values, layout, suffix, nested, path)
    dropped: dict[str, str] = {}
    if nested:
        _check_keys(values, {"config"}, "", path, dropped, ignore)
    _check_keys(top, _TOP | {part + suffix for part in _PARTS}, "", path, dropped, ignore)
    if top.get(f"hidden_state_decoder{suffix}") is not None:
        raise AdapterFormatError(
            f"{path}: hidden_state_decoder{suffix} is set, but our model does not have a second decoder, of the encoder's "
            "hidden states"
        )
    if layout == "moto" and top.get("use_abs_recons_loss", False) is not False:
        raise AdapterFormatError(
            f"{path}: use_abs_recons_loss={top['use_abs_recons_loss']!r}, but our reconstruction loss is the mean squared "
            "error (LARA, Eq. 3)"
        )
    for where, used in _USED.items():
        part, _, inner = where.partition(".")
        section = top.get(part + suffix)
        named = f"{part}{suffix}.{inner}".rstrip(".")
        if inner and isinstance(section, Mapping):
            section = section.get(inner)
        if not isinstance(section, Mapping):
            raise AdapterFormatError(f"{path}: {named}={section!r}, but a mapping is expected")
        _check_keys(section, used, f"{named}.", path, dropped, ignore)
    unused = sorted(key for key in ignore if not dropped.get(key, "").endswith("as requested"))
    if unused:
        raise LaraArgumentError(f"convert: ignore_settings={unused}, but {path} does not have such unknown settings")
    encoder = top[f"image_encoder{suffix}"]
    if encoder.get("from_tf", False) is not False:
        raise AdapterFormatError(f"{path}: image_encoder{suffix}.from_tf is set, but only PyTorch weights can be used")
    name = encoder.get("pretrained_model_name_or_path")
    flat = {key: top[key] for key in _TOP if key in top}
    flat |= {f"{part}_config": top.get(part + suffix) for part in _PARTS}
    return OfficialSettings(layout, flat, name if isinstance(name, str) else None, dropped)


def _check_keys(
    section: Mapping[str, Any], used: set[str], where: str, path: Path, dropped: dict[str, str], ignore: Collection[str]
) -> None:
    for key in section:
        if key in used or key in _HYDRA:
            continue
        if not where and key in _NO_EFFECT:
            dropped[key] = _NO_EFFECT[key]
        elif where.endswith("config.") and key in _NOT_READ | {"torch_dtype", "dtype"}:
            dropped[f"{where}{key}"] = "not read by the official code"
        elif f"{where}{key}" in ignore:
            dropped[f"{where}{key}"] = f"{section[key]!r}, ignored as requested"
        else:
            raise AdapterFormatError(
                f"{path}: {where}{key}={section[key]!r} is an unknown setting, which may change what the model computes, "
                "so nothing is converted; if it does not, pass --ignore-settings (ignore_settings=)"
            )


def _labels(values: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every `_target_`, at any depth."""
    items: Any = ()
    if isinstance(values, Mapping):
        if "_target_" in values:
            yield where, values["_target_"]
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    if depth > 20:
        raise AdapterFormatError(f"settings nested deeper than 20 levels at {where}: not settings of a model")
    for key, value in items:
        yield from _labels(value, f"{where}.{key}" if where else str(key), depth + 1)


def _check_labels(values: Mapping[str, Any], layout: str, suffix: str, nested: bool, path: Path) -> None:
    prefix, module = "config." if nested else "", _MODULES[layout]
    allowed = {"": f"{module}.{_TOKENIZER}", f"{prefix}image_encoder{suffix}": _VIT_MAE}
    if nested:
        allowed["config"] = "moto.latent_motion_tokenizer.configs.LatentMotionTokenizerConfig"
    for part, name in _CLASSES.items():
        allowed[f"{prefix}{part}{suffix}"] = f"{module}.{name}"
        if part != "vector_quantizer":
            allowed[f"{prefix}{part}{suffix}.config"] = _VIT_CONFIG
    for where, label in _labels(values):
        if label != allowed.get(where):
            key, known = f"{where}._target_" if where else "_target_", allowed.get(where)
            raise AdapterFormatError(
                f"{path}: {key}={label!r}, but {f'only {known!r}' if known else 'no class'} is known there; nothing was "
                "imported"
            )


def choose_encoder(settings: OfficialSettings, width: int, path: Path) -> tuple[str, str]:
    """The image encoder for our settings, and why it was chosen.

    Raises:
        AdapterFormatError: the settings name one that does not exist here, and none of this width is published.
    """
    named = settings.image_encoder
    if named is not None and _HUB_ID.fullmatch(named):
        return named, "named by the settings"
    if named is not None and Path(named).is_dir():
        return named, "a local folder, named by the settings"
    if width not in _PUBLISHED:
        raise AdapterFormatError(
            f"{path} names {named!r} as its image encoder, which is neither a Hub id nor an existing folder, and no "
            f"published ViT-MAE has width {width}; pass --image-encoder (image_encoder=)"
        )
    return _PUBLISHED[width], f"the published ViT-MAE of width {width}; the settings name {named!r}"


def to_moto(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in LARA's layout, from :func:`config_to_official`, in Moto's."""

    def relabelled(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: relabelled(inner) for key, inner in value.items()}
        return value.replace(_MODULES["official"], _MODULES["moto"]) if isinstance(value, str) else value

    moto = {with_moto_names(k): v if k == "image_encoder_config" else relabelled(v) for k, v in values.items()}
    return {"_target_": f"{_MODULES['moto']}.{_TOKENIZER}", **moto}


def with_moto_names(message: str) -> str:
    """A message about keys of the official layout, with Moto's names for them."""
    return re.sub(rf"\b({'|'.join(_PARTS)})_config\b", r"\1", message)
