"""Which latent action model made something: enough to find the same weights again, and no path of this machine."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import Dataset
from ..data.gap import parse_gap
from ..errors import DatasetError, LaraArgumentError
from ..storage.files import sha256
from . import checkpoint
from .config import LatentActionConfig
from .model import LatentActionModel

logger = logging.getLogger(__name__)

__all__ = ["action_fingerprint", "learnt_from", "open_model", "warn_of_gap"]


def action_fingerprint(actions: Iterable[np.ndarray]) -> str:
    """32 hexadecimal digits that stand for the actions of a dataset's episodes, [T, A] each, in their order."""
    digest = hashlib.sha256()
    for each in actions:
        digest.update(np.ascontiguousarray(each, np.float32).tobytes())
    return digest.hexdigest()[:32]


def learnt_from(model: LatentActionModel, dataset: Dataset) -> bool:
    """Whether a model learnt from the actions of exactly these episodes, and so knows them (`train-lam --actions`)."""
    if model.config.labelled_by is None:
        return False
    try:
        return model.config.labelled_by == action_fingerprint(map(dataset.known_actions, dataset.episodes))
    except (DatasetError, LaraArgumentError):  # damaged, or none
        return False


def warn_of_gap(model: LatentActionModel, gap: int, fps: float) -> None:
    """Warn where a model is asked about pairs that are nearer or farther than those that it learnt from.

    Args:
        model: whose configuration says its gap, if it is known.
        gap: in frames.
        fps: of these frames.
    """
    if model.config.gap is None:
        return
    known = parse_gap(model.config.gap)
    if (known.frames or round((known.seconds or 0.0) * fps)) != gap:
        logger.warning("gap=%d frames, but the LAM learnt with gap=%s: train, label and align with one", gap, known)


def open_model(source: str | os.PathLike[str], revision: str | None = None) -> tuple[LatentActionModel, dict[str, Any]]:
    """Load a latent action model, and say which one it is.

    Args:
        source: local folder, or Hub id.
        revision: commit, tag or branch on the Hub.

    Returns:
        The model in eval mode on the CPU, and JSON-able facts: `source` (Hub id, or the folder's name), `revision` (the
        Hub's commit, None for a folder), `weights_sha256`, `config_sha256`, `image_encoder` and `image_encoder_revision`,
        `image_size`, `latent_shape` [N, D], `codebook_size`.

    Raises:
        AdapterFormatError: as :meth:`LatentActionModel.from_pretrained`.
        LaraArgumentError: likewise.
    """
    folder = checkpoint.locate(source, revision)
    model = LatentActionModel.from_pretrained(folder)
    config: LatentActionConfig = model.config
    local = Path(source).is_dir()
    return model, {
        "source": folder.resolve().name if local else str(source),
        # the Hub's cache keeps each commit in snapshots/<commit>
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "weights_sha256": sha256(folder / checkpoint.WEIGHTS),
        "config_sha256": sha256(folder / checkpoint.CONFIG),
        "image_encoder": config.image_encoder,
        "image_encoder_revision": config.image_encoder_revision,
        "image_size": config.image_size,
        "latent_shape": list(model.latent_shape),
        "codebook_size": int(model.quantizer.codebook_size),  # type: ignore[arg-type]
    }
