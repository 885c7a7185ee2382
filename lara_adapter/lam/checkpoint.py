"""A latent action model as a folder: `config.json` and `model.safetensors`, without the frozen networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterFormatError, LaraArgumentError
from ..storage.files import read_json, replace_folder, write_json, write_tensors
from ..storage.hub import locate_folder, push_folder
from ..storage.origins import Origin, checked, snapshot_origin
from ..storage.untrusted import safe_path
from .config import ORIGIN, LatentActionConfig

__all__ = ["CONFIG", "WEIGHTS", "locate", "push", "read_config", "read_origin", "write"]

# Fixed names: a path taken from a downloaded file could lead anywhere.
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the folder of a model, downloading it if `source` is not a local folder; see :func:`locate_folder`."""
    return locate_folder(source, revision, [CONFIG, WEIGHTS], "latent action model")


def read_config(folder: Path) -> LatentActionConfig:
    """Read the configuration of a model's folder.

    Raises:
        AdapterFormatError: it is missing, foreign, newer, or holds values out of range; or a link leads out of the folder.
    """
    for name in (CONFIG, WEIGHTS):
        safe_path(folder, name)
    try:
        return LatentActionConfig.load(folder / CONFIG)
    except LaraArgumentError as error:
        raise AdapterFormatError(f"{folder / CONFIG} is damaged: {error}") from error


def read_origin(folder: Path) -> Origin | None:
    """The repository and commit that a folder is, or else the one that its model came from before it was trained on."""
    return snapshot_origin(folder, root=True) or checked(read_json(folder / CONFIG).get(ORIGIN))


def write(
    folder: str | os.PathLike[str],
    config: LatentActionConfig,
    tensors: Mapping[str, Tensor],
    origin: Origin | None = None,
) -> None:
    """Write a model's folder, whole or not at all."""
    with replace_folder(folder) as fresh:
        write_json(fresh / CONFIG, config.to_dict() | ({} if origin is None else {ORIGIN: origin}))
        write_tensors(fresh / WEIGHTS, tensors)


def push(folder: Path, repo_id: str, config: LatentActionConfig, **options: Any) -> str:
    """Upload a model's folder; see :func:`lara_adapter.storage.hub.push_folder`. An existing README.md stays."""
    return push_folder(folder, repo_id, [CONFIG, WEIGHTS], card=lambda old: old or _card(repo_id, config), **options)


def _card(repo_id: str, config: LatentActionConfig) -> str:
    encoder = "its own, in these weights"
    if config.image_encoder is not None:  # a local path would tell nothing elsewhere
        origin = checked({"repo_id": config.image_encoder, "revision": config.image_encoder_revision})
        encoder = (
            f"{origin['repo_id']} at {origin['revision']}, frozen" if origin else "a frozen one, not in these weights"
        )
    return f"""---
library_name: lara-adapter
pipeline_tag: robotics
tags:
- lara
- latent-action-model
- arxiv:2606.07100
---

# Latent action model

What changed between two frames, for LARA, Latent Action Representation Alignment
([arXiv 2606.07100](https://arxiv.org/abs/2606.07100)).

| | |
|---|---|
| latent action | {config.queries} tokens of width {config.latent_dim}, {config.codebook_size} codes |
| frames | {config.image_size} x {config.image_size} pixels |
| image encoder | {encoder} |

```python
from lara_adapter import LatentActionModel, attach_lara

lam = LatentActionModel.from_pretrained("{repo_id}")
lara = attach_lara(policy, lam)
```
"""
