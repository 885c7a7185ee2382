"""Convert a latent action model's files: the authors' layouts and ours, there and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..errors import AdapterFormatError, LaraArgumentError
from ..lam import checkpoint
from ..lam.config import LatentActionConfig
from ..storage.files import replace_file, replace_folder, sha256, write_json, write_tensors
from .frames import fold, unfold
from .layouts import to_moto
from .place import FOLDER
from .policy import write_adapter
from .reading import read_model
from .report import RECORD, ConversionReport, recorded_files
from .settings import config_to_official
from .source import find
from .state import official_shapes, state_to_official

__all__ = ["convert_checkpoint"]

_LAYOUTS = {"lara": "lara_adapter", "official": "official", "moto": "moto"}  # `to`, and the name in the report


def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Literal["lara", "official", "moto"] | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    settings: str | os.PathLike[str] | None = None,
    frames: Literal["auto", "unit", "imagenet"] = "auto",
    image_encoder: str | None = None,
    allow_pickle: bool = False,
    adapter: bool = False,
    ignore_settings: Sequence[str] = (),
) -> ConversionReport:
    """Convert a latent action model between our folder, the official LARA tokenizer's and TencentARC/Moto's.

    Strict: every tensor and setting is mapped, reported as dropped, or refused. Nothing that a file names is imported. The
    destination appears whole or not at all, with `conversion.json` beside the model.

    Args:
        source: folder, weights file (settings beside it) or Hub id. May be a policy's checkpoint of the official joint
            training: the latent action model is found by its prefix, its settings in `latent_motion_tokenizer/`.
        destination: folder: new, empty, or an earlier conversion and nothing else.
        to: "lara" (ours), "official" (LARA's: config.json, model.safetensors) or "moto" (config.yaml and
            pytorch_model.bin, the only files Moto's loader reads); None: ours from theirs, LARA's from ours.
        subfolder: inside the source, for instance "latent_motion_tokenizer".
        revision: commit, tag or branch on the Hub.
        settings: file of the tokenizer's settings, if it is not beside the weights.
        frames: range of the official model's frames: "unit", [0, 1] (LARA's first stage; the weights are then
            bit-identical), or "imagenet", ImageNet-normalised (LARA's joint training, Moto), which ours reproduces from
            [0, 1] with the normalisation in the decoder's linear maps. "auto": from `conversion.json` beside the source;
            else "imagenet" for Moto and for a model in a policy's checkpoint or folder, else "unit". From ours,
            `image_mean` and `image_std` decide, and only "auto" is allowed.
        image_encoder: Hub id or folder that the result names; None: the one in the settings, or the published ViT-MAE of
            that width if they name a local folder of their author.
        allow_pickle: read `.bin` files, by torch.load(weights_only=True), torch >= 2.6.
        adapter: from a policy's checkpoint, write projector and LAM as an adapter for `load_lara`, not the LAM alone.
        ignore_settings: unknown settings to ignore instead of refusing them, by dotted path; they are reported.

    Returns:
        What was read, mapped, dropped and why.

    Raises:
        AdapterFormatError: the source is damaged, foreign, or has parts that the target cannot express; the message names
            file and key. Nothing is written.
        LaraArgumentError: an argument is out of range, or the destination holds something else.
    """
    if to is not None and to not in _LAYOUTS:
        raise LaraArgumentError(f"convert: to={to!r}, but one of {list(_LAYOUTS)} is expected")
    if frames not in ("auto", "unit", "imagenet"):
        raise LaraArgumentError(f"convert: frames={frames!r}, but 'auto', 'unit' or 'imagenet' is expected")
    target = Path(destination).absolute()
    _check_destination(target)
    path, root = find(source, subfolder, revision, allow_pickle)
    if target.resolve() in (root.resolve(), path.resolve()):
        raise LaraArgumentError(f"convert: the destination {target} is the source; choose another")
    read = read_model(
        path, settings=settings, frames=frames, image_encoder=image_encoder, allow_pickle=allow_pickle,
        ignore=ignore_settings,
    )  # fmt: skip
    layout = _LAYOUTS[to or ("official" if read.layout == "lara_adapter" else "lara")]
    if layout == read.layout:
        raise LaraArgumentError(f"convert: {source} already has the layout {layout!r}; choose another with to=")
    if adapter and (layout != "lara_adapter" or read.policy is None):
        raise LaraArgumentError("convert: adapter=True needs a policy's checkpoint as source and our layout as target")
    state, config = read.state, read.config
    if layout == "lara_adapter":
        state = fold(state, config, read.frames)
        config = replace(config, image_mean=read.frames.mean, image_std=read.frames.std)
    elif read.layout == "lara_adapter":
        state = unfold(state, config, read.frames)
    folded = "lara_adapter" in (layout, read.layout) and not read.frames.is_unit
    mapped = official_shapes(config)
    report = ConversionReport(
        source=str(source) + (f"/{subfolder}" if subfolder else ""),
        revision=root.name if root.parent.name == "snapshots" else revision,
        destination=str(target), source_layout=read.layout, target_layout=layout,
        prefix=read.place.prefix if read.place else "",
        read={str(file.relative_to(root) if file.is_relative_to(root) else file): sha256(file) for file in read.files},
        tensors=len(mapped), parameters=sum(torch.Size(shape).numel() for shape in mapped.values()),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in read.state.values() if t.is_floating_point()}),
        image_encoder=read.image_encoder, frames_mean=read.frames.mean, frames_std=read.frames.std,
        frames_reason=read.frames_reason, frames_folded=folded, dropped=read.dropped, notes=read.notes,
    )  # fmt: skip
    with replace_folder(target, keep_others=False) as fresh:
        if adapter:
            write_adapter(fresh, read, config, state)
        else:
            _write(fresh, layout, config, state)
        files = sorted(file for file in fresh.rglob("*") if file.is_file())
        report = replace(report, written={str(file.relative_to(fresh)): sha256(file) for file in files})
        write_json(fresh / RECORD, report.to_dict())
    return report


def _check_destination(target: Path) -> None:
    """Refuse to replace anything but an earlier conversion."""
    if target.is_file():
        raise LaraArgumentError(f"convert: the destination {target} is a file, but a folder is expected")
    if not target.is_dir():
        return
    files = [p for p in target.rglob("*") if not p.is_dir() and p != target / RECORD]
    own = recorded_files(target) if files else {}
    # a model that was trained further in its folder is no longer the conversion's
    foreign = sorted(str(p) for p in (q.relative_to(target) for q in files) if own.get(str(p)) != sha256(target / p))
    if foreign:
        raise LaraArgumentError(
            f"convert: the destination {target} holds {foreign[:5]}, which no earlier conversion wrote "
            "or which changed since; choose another folder"
        )


def _write(folder: Path, layout: str, config: LatentActionConfig, state: dict[str, Tensor]) -> None:
    """Write a model in one of the layouts."""
    if layout == "lara_adapter":
        checkpoint.write(folder, config, state)
        return
    values, tensors = config_to_official(config), state_to_official(state, config)
    if layout == "official":
        write_json(folder / "config.json", {"architectures": ["LatentMotionTokenizer"], "model_type": FOLDER, **values})
        write_tensors(folder / "model.safetensors", tensors)
        return
    try:
        import yaml
    except ImportError as error:
        raise AdapterFormatError(
            "Moto's config.yaml needs PyYAML, which cannot be imported: pip install pyyaml"
        ) from error
    with replace_file(folder / "config.yaml") as fresh:
        fresh.write_text(yaml.safe_dump(to_moto(values), sort_keys=False), encoding="utf-8")
    with replace_file(folder / "pytorch_model.bin") as fresh:
        torch.save(tensors, fresh)
