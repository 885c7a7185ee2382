"""`lara convert`."""

from __future__ import annotations

from typing import Any

from ..convert.checkpoints import convert_checkpoint
from .arguments import takes
from .output import write_result

__all__ = ["convert"]


@takes(convert_checkpoint, positional=("source", "destination"))
def convert(*, json: bool = False, **arguments: Any) -> int:
    """Convert the authors' latent action models (LARA's tokenizer, TencentARC/Moto's) to our format, and back.

    Every tensor and setting is accounted for; nothing that a file names is imported. Exit status: 0; 2 if it is
    refused, and then nothing is written.
    """
    report = convert_checkpoint(**arguments)
    write_result(report.to_dict(), str(report), json)
    return 0
