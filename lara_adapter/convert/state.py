"""The weights of our latent action model and of the official one: LARA's tokenizer, Moto's `LatentMotionTokenizer`.

Both hold the same numbers under different names. The official state has `m_former.*`, `vector_quantizer.embedding.weight`,
`vq_down_resampler.*`, `vq_up_resampler.*` and `decoder.*` in the layout of transformers' ViT; its `image_encoder.*` and
`loss_fn_lpips.*` are frozen networks and not part of it. In ours, key and value share one matrix, and the last 1 x 1
convolution is a linear map. Every name and shape is checked, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterFormatError
from ..lam.config import LatentActionConfig

__all__ = ["check_expressible", "official_shapes", "state_from_official", "state_to_official"]

Shape = tuple[int, ...]

# state of our quantiser besides the codes, which the official layout does not have
_BOOKKEEPING = ("quantizer.offset", "quantizer.usage", "quantizer.step", "quantizer.ready")
_CODES = "quantizer.weight"


class _Entry(NamedTuple):
    """One tensor of ours, and the official ones that it consists of, stacked along the first dimension.

    own: our name.
    official: official names.
    shape: of each official tensor.
    linear: the official tensor is a 1 x 1 convolution, ours a matrix.
    """

    own: str
    official: tuple[str, ...]
    shape: Shape
    linear: bool = False

    @property
    def own_shape(self) -> Shape:
        """Shape of our tensor."""
        shape = self.shape[:2] if self.linear else self.shape
        return (len(self.official) * shape[0], *shape[1:])


def _linear(own: str, official: str, out: int, into: int) -> Iterator[_Entry]:
    yield _Entry(f"{own}.weight", (f"{official}.weight",), (out, into))
    yield _Entry(f"{own}.bias", (f"{official}.bias",), (out,))


def _norm(own: str, official: str, width: int) -> Iterator[_Entry]:
    for name in ("weight", "bias"):
        yield _Entry(f"{own}.{name}", (f"{official}.{name}",), (width,))


def _layers(own: str, official: str, count: int, width: int, mlp: int) -> Iterator[_Entry]:
    """Transformer layers: ours, and those of transformers' ViTEncoder."""
    for number in range(count):
        ours, theirs = f"{own}.layers.{number}", f"{official}.encoder.layer.{number}"
        attention = f"{theirs}.attention.attention"
        yield from _norm(f"{ours}.attention_norm", f"{theirs}.layernorm_before", width)
        yield from _linear(f"{ours}.query", f"{attention}.query", width, width)
        for name, shape in (("weight", (width, width)), ("bias", (width,))):
            yield _Entry(f"{ours}.key_value.{name}", (f"{attention}.key.{name}", f"{attention}.value.{name}"), shape)
        yield from _linear(f"{ours}.attention_output", f"{theirs}.attention.output.dense", width, width)
        yield from _norm(f"{ours}.mlp_norm", f"{theirs}.layernorm_after", width)
        yield from _linear(f"{ours}.mlp.0", f"{theirs}.intermediate.dense", mlp, width)
        yield from _linear(f"{ours}.mlp.2", f"{theirs}.output.dense", width, mlp)
    yield from _norm(f"{own}.norm", f"{official}.layernorm", width)


def _entries(config: LatentActionConfig) -> Iterator[_Entry]:
    """Every tensor that both layouts hold, the codebook included."""
    c, own, official = config, "inverse_dynamics", "m_former"
    width = c.idm_width
    embeddings = f"{official}.embeddings"
    yield _Entry(f"{own}.queries", (f"{embeddings}.latent_motion_token",), (1, c.queries, width))
    yield _Entry(f"{own}.separator", (f"{embeddings}.sep_token",), (1, 1, width))
    yield from _linear(f"{own}.projection", f"{embeddings}.projection", width, c.encoder_width)
    length = c.queries + 1 + 2 * c.encoder_tokens
    yield _Entry(f"{own}.positions", (f"{embeddings}.position_embeddings",), (1, length, width))
    yield _Entry(f"{own}.token_types", (f"{embeddings}.token_type_embeddings",), (2, width))
    yield from _layers(own, official, c.idm_layers, width, c.idm_mlp)
    yield from _linear(f"{own}.down.0", "vq_down_resampler.0", c.fdm_width, width)
    yield from _linear(f"{own}.down.2", "vq_down_resampler.2", c.latent_dim, c.fdm_width)

    yield _Entry(_CODES, ("vector_quantizer.embedding.weight",), (c.codebook_size, c.latent_dim))

    own, official = "forward_dynamics", "decoder.transformer"
    width, patch = c.fdm_width, c.fdm_patch_size
    embeddings = f"{official}.embeddings"
    yield from _linear(f"{own}.up.0", "vq_up_resampler.0", c.latent_dim, c.latent_dim)
    yield from _linear(f"{own}.up.2", "vq_up_resampler.2", width, c.latent_dim)
    if c.fusion == "add":
        yield from _linear(f"{own}.fuse", f"{embeddings}.query_pooling_layer", width, c.queries * width)
    patches = f"{embeddings}.patch_embeddings.projection"
    yield _Entry(f"{own}.patch_embedding.weight", (f"{patches}.weight",), (width, 3, patch, patch))
    yield _Entry(f"{own}.patch_embedding.bias", (f"{patches}.bias",), (width,))
    if c.mask_token:
        yield _Entry(f"{own}.mask_token", (f"{embeddings}.mask_token",), (1, 1, width))
    length = (c.image_size // patch) ** 2 * (1 + c.mask_token) + (c.queries if c.fusion == "concat" else 0)
    yield _Entry(f"{own}.positions", (f"{embeddings}.position_embeddings",), (1, length, width))
    yield from _layers(own, official, c.fdm_layers, width, c.fdm_mlp)
    yield _Entry(f"{own}.head.weight", ("decoder.decoder.0.weight",), (3 * patch * patch, width, 1, 1), linear=True)
    yield _Entry(f"{own}.head.bias", ("decoder.decoder.0.bias",), (3 * patch * patch,))


def check_expressible(config: LatentActionConfig) -> None:
    """Refuse a model with a part that the official one does not have."""
    options = ("difference_input", "normalize_latent", "subtract_still", "residual")
    extras = [name for name in options if getattr(config, name)]
    if config.image_encoder is None:
        extras.append("image_encoder=None (its own encoder)")
    if config.encoder_size != config.image_size:
        # in theirs encoder and decoder take the same frames
        extras.append(f"encoder_image_size={config.encoder_size} beside image_size={config.image_size}")
    if extras:
        raise AdapterFormatError(
            f"the official layout does not have {', '.join(extras)}; only a model without can be converted, as one of "
            "`lara train-lam --preset paper`"
        )


def _check_names(state: Mapping[str, Tensor], expected: set[str], layout: str) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise AdapterFormatError(
            f"not {layout} state of this configuration: {len(missing)} tensors missing {missing[:5]}, "
            f"{len(unknown)} unknown {unknown[:5]}"
        )


def _check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tensor.shape != shape:
        raise AdapterFormatError(f"{name} has shape {list(tensor.shape)}, but {list(shape)} is expected")


def official_shapes(config: LatentActionConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the official state for `config`.

    Raises:
        AdapterFormatError: `config` has a part that the official model does not have.
    """
    check_expressible(config)
    return {name: entry.shape for entry in _entries(config) for name in entry.official}


def state_from_official(state: Mapping[str, Tensor], config: LatentActionConfig) -> dict[str, Tensor]:
    """Our state from an official one; for `model.load_state_dict(..., strict=True)`.

    The quantiser's statistics are reset: even usage, step 0, no warm-up.

    Args:
        state: official name to tensor, without the frozen `image_encoder.*` and `loss_fn_lpips.*`. May hold gradients: the
            conversion is linear.
        config: from :func:`config_from_official`.

    Returns:
        Our name to tensor: every entry of the state_dict of a :class:`LatentActionModel` with this configuration and a
        frozen image encoder; dtype and device are kept, no memory is shared with `state`.

    Raises:
        AdapterFormatError: a tensor is missing, unknown or of another shape; the message names it.
    """
    _check_names(state, set(official_shapes(config)), "the official")
    result: dict[str, Tensor] = {}
    for entry in _entries(config):
        for name in entry.official:
            _check_shape(name, state[name], entry.shape)
        result[entry.own] = torch.cat([state[name] for name in entry.official]).reshape(entry.own_shape)
    codes = result[_CODES]
    result["quantizer.offset"] = torch.zeros_like(codes)
    result["quantizer.usage"] = codes.new_full((config.codebook_size,), 1 / config.codebook_size)
    result["quantizer.step"] = torch.zeros((), dtype=torch.int64, device=codes.device)
    result["quantizer.ready"] = torch.ones((), dtype=torch.int64, device=codes.device)
    return result


def state_to_official(state: Mapping[str, Tensor], config: LatentActionConfig) -> dict[str, Tensor]:
    """The official state from one of ours; the exact inverse of :func:`state_from_official`.

    The codes are written as they are used (`weight + offset`), the usage statistics are not.

    Args:
        state: `model.state_dict()` of a model with a frozen image encoder and our quantiser.
        config: `model.config`.

    Returns:
        Official name to tensor; dtype and device are kept, no memory is shared with `state`.

    Raises:
        AdapterFormatError: the model has a part that the official one does not have, its quantiser is still in the warm-up,
            or a tensor is missing, unknown or of another shape; the message names it.
    """
    check_expressible(config)
    entries = list(_entries(config))
    _check_names(state, {entry.own for entry in entries} | set(_BOOKKEEPING), "the latent action model's")
    if not state["quantizer.ready"] > 0:
        raise AdapterFormatError("quantizer.ready is 0: the warm-up has not ended, so there are no codes yet")
    result: dict[str, Tensor] = {}
    for entry in entries:
        tensor = state[entry.own]
        _check_shape(entry.own, tensor, entry.own_shape)
        if entry.own == _CODES:
            _check_shape("quantizer.offset", state["quantizer.offset"], entry.own_shape)
            tensor = tensor + state["quantizer.offset"]
        for name, part in zip(entry.official, tensor.chunk(len(entry.official))):
            result[name] = part.reshape(entry.shape).clone()
    return result
