"""A latent action model as a folder: `config.json` and `model.safetensors`, without the frozen networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..errors import AdapterFormatError, LaraArgumentError
from ..files import locate_folder, replace_folder, write_json, write_tensors
from .config import LatentActionConfig

__all__ = ["CONFIG", "WEIGHTS", "locate", "read_config", "write"]

# Fixed names: a path taken from a downloaded file could lead anywhere.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the folder of a model, downloading it if `source` is no local folder; see :func:`locate_folder`."""
    return locate_folder(source, revision, [CONFIG, WEIGHTS])


def read_config(folder: Path) -> LatentActionConfig:
    """Read the configuration of a model's folder.

    Raises:
        AdapterFormatError: it is missing, foreign, newer, or holds values out of range.
    """
    try:
        return LatentActionConfig.load(folder / CONFIG)
    except LaraArgumentError as error:
        raise AdapterFormatError(f"{folder / CONFIG} is damaged: {error}") from error


def write(folder: str | os.PathLike[str], config: LatentActionConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's folder, whole or not at all."""
    with replace_folder(folder) as fresh:
        write_json(fresh / CONFIG, config.to_dict())
        write_tensors(fresh / WEIGHTS, tensors)
