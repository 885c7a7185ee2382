"""Read a latent action model from any of the layouts, check it, and give it our names."""

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
from .layouts import choose_encoder, parse, with_moto_names
from .place import FOLDER, Place, place_in
from .report import RECORD, recorded_frames
from .settings import config_from_official, config_to_official
from .source import SETTINGS, Weights, find_weights, read_settings
from .state import state_from_official, state_to_official

__all__ = ["Model", "read_model"]

_FROZEN = ("image_encoder.", "loss_fn_lpips.")
# Moto's preprocessor divides by std + 1e-6.
_MOTO_FRAMES = FrameRange(IMAGENET.mean, (0.229001, 0.224001, 0.225001))
# settings of training and initialisation, which the official layout does not have
_TRAINING = (
    "vq_warmup_steps", "vq_init_from_data", "vq_revive_every", "vq_usage_decay", "image_encoder_revision",
    "idm_position_range", "fdm_position_range",
)  # fmt: skip


class Model(NamedTuple):
    """A latent action model under our names.

    layout: what it was read from: "lara_adapter", "official" or "moto".
    config: its settings; of an official one, with `image_mean` 0 and `image_std` 1.
    state: its tensors, values as in the file.
    frames: range of the official model's frames.
    frames_reason: why that is assumed.
    image_encoder: the one named, and why.
    files: what was read.
    dropped: what other layouts do not have, with the reason.
    notes: other differences.
    place: its position in an official checkpoint.
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
    path: Path, *, settings: str | os.PathLike[str] | None, frames: str, image_encoder: str | None, allow_pickle: bool,
    ignore: Collection[str],
) -> Model:  # fmt: skip
    """Read a model from a folder or weights file; the arguments are those of :func:`convert_checkpoint`.

    Raises:
        AdapterFormatError: damaged, foreign, or with parts that have no counterpart.
        LaraArgumentError: `frames` is given for a model of ours.
    """
    folder = path.parent if path.is_file() else path
    content = _settings_beside(folder, settings)
    if content[0].get("format") == OURS:
        return _read_ours(path, folder, image_encoder, frames)
    return _read_official(path, content, settings is not None, frames, image_encoder, allow_pickle, ignore)


def _settings_beside(folder: Path, given: str | os.PathLike[str] | None) -> tuple[dict[str, Any], Path]:
    """The settings and their file; empty if there are none beside the weights."""
    if given is not None:
        return read_settings(Path(given)), Path(given)
    for name in SETTINGS:
        if (folder / name).is_file():
            return read_settings(folder / name), folder / name
    return {}, folder / SETTINGS[-1]


@contextmanager
def _naming(path: Path, layout: str = "") -> Iterator[None]:
    """Name the file, and its own keys, in errors of functions that work in memory."""
    try:
        yield
    except AdapterFormatError as error:
        message = with_moto_names(str(error)) if layout == "moto" else str(error)
        raise AdapterFormatError(message if str(path) in message else f"{path}: {message}") from error


def _read_ours(path: Path, folder: Path, image_encoder: str | None, frames: str) -> Model:
    if frames != "auto":
        raise LaraArgumentError(
            f"convert: frames={frames!r}, but for a model of ours they are image_mean and image_std of config.json"
        )
    config = checkpoint.read_config(folder)
    file = path if path.is_file() else folder / checkpoint.WEIGHTS
    weights = Weights(file, allow_pickle=False)
    counters = {"quantizer.step", "quantizer.ready"} & set(weights.names)
    state = weights.read(set(weights.names) - counters) | weights.read_counters(counters)
    dropped = {
        "quantizer.usage": "statistics of training; not in the official layout",
        "quantizer.step": "number of training steps; not in the official layout",
        "quantizer.ready": "whether the warm-up has ended; not in the official layout",
    }
    for name in _TRAINING:
        if getattr(config, name) != getattr(LatentActionConfig(), name):
            dropped[name] = f"{getattr(config, name)!r}: a setting of training; not in the official layout"
    if image_encoder is not None:
        config = replace(config, image_encoder=image_encoder, image_encoder_revision=None)
    with _naming(folder / checkpoint.CONFIG):
        config_to_official(config)
    with _naming(file):
        state_to_official(state, config)
    note = "the codebook is written as the quantizer uses it: quantizer.weight + quantizer.offset"
    notes = [note] if state["quantizer.offset"].any() else []
    encoder = f"{config.image_encoder} ({'as requested' if image_encoder else 'config.json'})"
    return Model(
        layout="lara_adapter", config=config, state=state, frames=FrameRange(config.image_mean, config.image_std),
        frames_reason="image_mean and image_std of config.json", image_encoder=encoder,
        files=[folder / checkpoint.CONFIG, file], dropped=dropped, notes=notes,
    )  # fmt: skip


def _read_official(
    path: Path, content: tuple[dict[str, Any], Path], given: bool, frames: str, image_encoder: str | None,
    allow_pickle: bool, ignore: Collection[str],
) -> Model:  # fmt: skip
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
            f"{file} is missing: the settings of the latent action model in {weights.path}; pass their file with "
            "--settings (settings=)"
        )
    settings = parse(values, file, ignore)
    own = [name for name in place.names if not name.removeprefix(place.prefix).startswith(_FROZEN)]
    tensors = {name.removeprefix(place.prefix): tensor for name, tensor in weights.read(own).items()}
    with _naming(file, settings.layout):
        config = config_from_official(settings.values)
        encoder, why = image_encoder, "as requested"
        if encoder is None:
            encoder, why = choose_encoder(settings, config.encoder_width, file)
        config = replace(config, image_encoder=encoder)
    with _naming(weights.path):
        state = state_from_official(tensors, config)
    frame_range, reason = _choose_frames(frames, settings.layout, place.in_policy, folder)
    shards = weights.files(own)
    return Model(
        layout=settings.layout, config=config, state=state, frames=frame_range, frames_reason=reason,
        image_encoder=f"{encoder} ({why})", files=[file, *([] if weights.path in shards else [weights.path]), *shards],
        dropped={**settings.dropped, **_unmapped(place)}, notes=_notes(settings.layout, frame_range, place),
        place=place, weights=weights, policy=policy,
    )  # fmt: skip


def _unmapped(place: Place) -> dict[str, str]:
    """The tensors of a checkpoint that are not mapped, with the reason."""
    unmapped = {}
    for frozen in _FROZEN:
        count = sum(name.removeprefix(place.prefix).startswith(frozen) for name in place.names)
        if count:
            unmapped[f"{place.prefix}{frozen}*"] = f"{count} tensors of a frozen network with published weights"
    if place.others:
        unmapped["the rest of the policy"] = f"{place.others} tensors outside {place.prefix}*"
    return unmapped


def _notes(layout: str, frames: FrameRange, place: Place) -> list[str]:
    notes = []
    if layout == "moto":
        notes.append("Moto uses the value of the perceptual loss but not its gradient; training ours further uses both")
    if not frames.is_unit:
        notes.append(
            "ours computes reconstruction and perceptual loss on [0, 1], the official model on its normalised frames; "
            "latent, codes, codebook terms and picture are the same"
        )
    if place.projector:
        notes.append(f"{', '.join(place.projector)}: the projector, written only by --adapter (adapter=True)")
    return notes


def _choose_frames(frames: str, layout: str, in_policy: bool, folder: Path) -> tuple[FrameRange, str]:
    """The range of the official model's frames, and why that is assumed."""
    imagenet = _MOTO_FRAMES if layout == "moto" else IMAGENET
    if frames != "auto":
        return (UNIT if frames == "unit" else imagenet), "as requested"
    recorded = recorded_frames(folder)
    if recorded is not None:
        return recorded, f"{RECORD} beside it"
    if layout == "moto":
        return imagenet, "Moto trains on them"
    if in_policy:
        return imagenet, "in a policy's checkpoint: joint training"
    beside = folder.parent / "config.json"
    if folder.name == FOLDER and beside.is_file() and "action_head_cfg" in read_settings(beside):
        return imagenet, "in a policy's folder: joint training"
    return UNIT, "a tokenizer alone: the release's first stage"
