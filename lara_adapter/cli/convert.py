"""`lara convert`."""

from __future__ import annotations

import json as json_module
from typing import Literal

from ..convert.checkpoints import convert_checkpoint
from .output import write

__all__ = ["convert"]


def convert(
    source: str,
    destination: str,
    /,
    *,
    to: Literal["lara", "official", "moto"] | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    settings: str | None = None,
    frames: Literal["auto", "unit", "imagenet"] = "auto",
    image_encoder: str | None = None,
    allow_pickle: bool = False,
    adapter: bool = False,
    ignore_settings: tuple[str, ...] = (),
    json: bool = False,
) -> int:
    """Convert the authors' latent action models (LARA's tokenizer, TencentARC/Moto's) into our folder, and back.

    Strict: every tensor and setting is accounted for, nothing that a file names is imported. Exit status: 0; 2 if it
    is refused, and then nothing is written.

    Args:
        source: folder, weights file or Hub id; a policy's checkpoint of the official joint training too.
        destination: folder to write; new, empty, or an earlier conversion.
        to: lara (ours), official (LARA's) or moto; without it ours from theirs, LARA's from ours.
        subfolder: inside the source: latent_motion_tokenizer for MengyaLiu/LARA_full.
        revision: commit, tag or branch on the Hub.
        settings: file of the tokenizer's settings, where it does not stand beside the weights.
        frames: what the official model is given: unit ([0, 1]: LARA's first stage), imagenet (normalised: LARA's joint
            training, Moto); auto: by where the model comes from, see the report.
        image_encoder: Hub id or folder of the frozen encoder that the result is to name.
        allow_pickle: read .bin files too, by torch.load(weights_only=True).
        adapter: from a policy's checkpoint: projector and LAM as an adapter for load_lara.
        ignore_settings: unknown settings to pass over instead of refusing them, by dotted path.
        json: print JSON instead of text.
    """
    report = convert_checkpoint(
        source, destination, to=to, subfolder=subfolder, revision=revision, settings=settings, frames=frames,
        image_encoder=image_encoder, allow_pickle=allow_pickle, adapter=adapter, ignore_settings=ignore_settings,
    )  # fmt: skip
    write(json_module.dumps(report.to_dict(), indent=2) if json else str(report))
    return 0
