"""A latent action model read from any of the layouts, checked, and in our terms."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import AdapterFormatError, LaraArgumentError
from ..lam import checkpoint
from ..lam.config import FORMAT as OURS
from ..lam.config import LatentActionConfig
from .frames import IMAGENET, UNIT, FrameRange
from .layouts import encoder_of, in_moto, parse
from .place import FOLDER, Place, place_in
from .report import RECORD, recorded_frames
from .settings import config_from_official, config_to_official
from .source import SETTINGS, Weights, find_weights, read_settings
from .state import state_from_official, state_to_official

__all__ = ["Model", "read_model"]

_FROZEN = ("image_encoder.", "loss_fn_lpips.")
# Moto's preprocessor divides by std + 1e-6.
_MOTO_FRAMES = FrameRange(IMAGENET.mean, (0.229001, 0.224001, 0.225001))
# Settings of training and random starts, which the official layout has no place for.
_TRAINING = (
    "vq_warmup_steps", "vq_init_from_data", "vq_revive_every", "vq_usage_decay", "image_encoder_revision",
    "idm_position_range", "fdm_position_range",
)  # fmt: skip


class Model(NamedTuple):
    """A latent action model in our terms.

    layout: "lara_adapter", "official" or "moto": what it was read from.
    config: its settings; of an official one, with `image_mean` 0 and `image_std` 1.
    state: its tensors under our names, as they were read.
    frames: what the official model is given.
    frames_reason: why that is assumed.
    image_encoder: what is named, and why.
    files: what was read.
    dropped: what it holds and an other layout does not, with the reason.
    notes: what else differs.
    place: where it stood among the tensors of an official checkpoint.
    weights: that checkpoint.
    policy: settings of the policy whose checkpoint it is, and their file; None if it is not one.
    """

    layout: str
    config: LatentActionConfig
    state: dict[str, Tensor]
    frames: FrameRange
    frames_reason: str
    image_encoder: str
    files: list[Path]
    dropped: dict[str, str]
    notes: list[str]
    place: Place | None = None
    weights: Weights | None = None
    policy: tuple[dict[str, Any], Path] | None = None


def read_model(
    path: Path,
    *,
    settings: str | os.PathLike[str] | None,
    frames: str,
    image_encoder: str | None,
    allow_pickle: bool,
    ignore: Collection[str],
) -> Model:
    """Read a model from its files; the arguments are those of :func:`convert_checkpoint`.

    Args:
        path: folder or weights file.
        settings: file of the settings, or None.
        frames: "auto", "unit" or "imagenet".
        image_encoder: to name instead.
        allow_pickle: whether a pickle may be opened.
        ignore: unknown settings to pass over.

    Raises:
        AdapterFormatError: damaged, foreign, or with parts that have no counterpart.
        LaraArgumentError: `frames` is said of a model of ours, or `image_encoder` is no name.
    """
    folder = path.parent if path.is_file() else path
    content = _settings_beside(folder, settings)
    if content[0].get("format") == OURS:
        return _read_ours(path, folder, image_encoder, frames)
    return _read_official(path, content, settings is not None, frames, image_encoder, allow_pickle, ignore)


def _settings_beside(folder: Path, given: str | os.PathLike[str] | None) -> tuple[dict[str, Any], Path]:
    """The settings, and their file; empty where there are none beside the weights."""
    if given is not None:
        return read_settings(Path(given)), Path(given)
    for name in SETTINGS:
        if (folder / name).is_file():
            return read_settings(folder / name), folder / name
    return {}, folder / SETTINGS[-1]


@contextmanager
def _naming(path: Path, layout: str = "") -> Iterator[None]:
    """Name the file, and keys as they stand in it, in errors of what works in memory."""
    try:
        yield
    except AdapterFormatError as error:
        message = in_moto(str(error)) if layout == "moto" else str(error)
        raise AdapterFormatError(message if str(path) in message else f"{path}: {message}") from error


def _read_ours(path: Path, folder: Path, image_encoder: str | None, frames: str) -> Model:
    if frames != "auto":
        raise LaraArgumentError(
            f"convert: frames={frames!r}, but of a model of ours image_mean and image_std in config.json say what they are"
        )
    config = checkpoint.read_config(folder)
    file = path if path.is_file() else folder / checkpoint.WEIGHTS
    weights = Weights(file, allow_pickle=False)
    counters = {"quantizer.step", "quantizer.ready"} & set(weights.names)
    state = weights.read(set(weights.names) - counters) | weights.read_counters(counters)
    dropped = {
        "quantizer.usage": "statistics of training; no place in the official layout",
        "quantizer.step": "counts the steps of training; no place in the official layout",
        "quantizer.ready": "says that the warm-up has ended; an official model has none",
    }
    for name in _TRAINING:
        if getattr(config, name) != getattr(LatentActionConfig(), name):
            dropped[name] = f"{getattr(config, name)!r}: a setting of training that the official layout has not"
    if image_encoder is not None:
        config = replace(config, image_encoder=image_encoder, image_encoder_revision=None)
    with _naming(folder / checkpoint.CONFIG):
        config_to_official(config)
    with _naming(file):
        state_to_official(state, config)
    notes = []
    if state["quantizer.offset"].any():
        notes.append("the codebook is written as it is in use: quantizer.weight + quantizer.offset")
    return Model(
        layout="lara_adapter",
        config=config,
        state=state,
        frames=FrameRange(config.image_mean, config.image_std),
        frames_reason="image_mean and image_std of config.json",
        image_encoder=f"{config.image_encoder} ({'as asked for' if image_encoder else 'config.json'})",
        files=[folder / checkpoint.CONFIG, file],
        dropped=dropped,
        notes=notes,
    )


def _read_official(
    path: Path,
    content: tuple[dict[str, Any], Path],
    given: bool,
    frames: str,
    image_encoder: str | None,
    allow_pickle: bool,
    ignore: Collection[str],
) -> Model:
    folder = path.parent if path.is_file() else path
    weights = Weights(path if path.is_file() else find_weights(folder), allow_pickle)
    place = place_in(weights)
    values, file = content
    policy = None
    if place.in_policy:
        policy = _settings_beside(folder, None)
        if not given:
            values, file = _settings_beside(folder / FOLDER, None)
    if not values:
        raise AdapterFormatError(
            f"{file} is missing: the settings of the latent action model in {weights.path}; say where they are with "
            "--settings (settings=)"
        )
    settings = parse(values, file, ignore)
    own = [name for name in place.names if not name.removeprefix(place.prefix).startswith(_FROZEN)]
    tensors = {name.removeprefix(place.prefix): tensor for name, tensor in weights.read(own).items()}
    with _naming(file, settings.layout):
        config = config_from_official(settings.values)
        encoder, why = image_encoder, "as asked for"
        if encoder is None:
            encoder, why = encoder_of(settings, config.encoder_width, file)
        config = replace(config, image_encoder=encoder)
    with _naming(weights.path):
        state = state_from_official(tensors, config)
    chosen, reason = _frames_of(frames, settings.layout, place.in_policy, folder)
    shards = weights.files(own)
    return Model(
        layout=settings.layout,
        config=config,
        state=state,
        frames=chosen,
        frames_reason=reason,
        image_encoder=f"{encoder} ({why})",
        files=[file, *([] if weights.path in shards else [weights.path]), *shards],
        dropped={**settings.dropped, **_left_out(place)},
        notes=_notes(settings.layout, chosen, place),
        place=place,
        weights=weights,
        policy=policy,
    )


def _left_out(place: Place) -> dict[str, str]:
    """What a checkpoint holds beside the tensors that are mapped, with the reason."""
    left = {}
    for frozen in _FROZEN:
        count = sum(name.removeprefix(place.prefix).startswith(frozen) for name in place.names)
        if count:
            left[f"{place.prefix}{frozen}*"] = f"{count} tensors of a frozen network that has weights of its own"
    if place.others:
        left["the rest of the policy"] = f"{place.others} tensors outside {place.prefix}*"
    return left


def _notes(layout: str, frames: FrameRange, place: Place) -> list[str]:
    notes = []
    if layout == "moto":
        notes.append("Moto takes no gradient from the perceptual loss, only its value; training ours on takes it")
    if not frames.is_unit:
        notes.append(
            "ours measures reconstruction and perceptual loss on [0, 1], the official model on its normalised frames; "
            "latent, codes, codebook terms and picture are the same"
        )
    if place.projector:
        notes.append(f"{', '.join(place.projector)}: the projector, written by --adapter (adapter=True) and not else")
    return notes


def _frames_of(asked: str, layout: str, in_policy: bool, folder: Path) -> tuple[FrameRange, str]:
    """What the official model is given, and why that is assumed."""
    imagenet = _MOTO_FRAMES if layout == "moto" else IMAGENET
    if asked != "auto":
        return (UNIT if asked == "unit" else imagenet), "as asked for"
    recorded = recorded_frames(folder)
    if recorded is not None:
        return recorded, f"{RECORD} beside it"
    if layout == "moto":
        return imagenet, "Moto trains on them"
    if in_policy:
        return imagenet, "out of a policy's checkpoint: joint training"
    beside = folder.parent / "config.json"
    if folder.name == FOLDER and beside.is_file() and "action_head_cfg" in read_settings(beside):
        return imagenet, "inside a policy's folder: joint training"
    return UNIT, "a tokenizer by itself: the release's first stage"
