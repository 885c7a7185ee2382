"""`lara cache`."""

from __future__ import annotations

from typing import Any

from ..lam.fill_cache import fill_cache
from ..lam.processes import is_first
from .arguments import takes
from .output import write_result

__all__ = ["cache"]


@takes(fill_cache, positional=("dataset",))
def cache(*, json: bool = False, **arguments: Any) -> int:
    """Encode the frames of a dataset with the frozen image encoder of a latent action model, before training needs them.

    Training then names the folder as its feature cache. A run that was killed is continued by the same command. Several
    processes: accelerate launch -m lara_adapter.cli cache ... Exit status: 0, also where damaged episodes were left out; 2
    if something is wrong with the arguments, the dataset or the model.
    """
    report = fill_cache(**arguments)
    if not is_first():
        return 0
    text = (
        f"{report.folder}: {report.frames} frames of {report.episodes} episodes and {len(report.cameras)} cameras; "
        f"{report.encoded} encoded, {report.gigabytes:.2f} GB added"
    )
    if report.left_out:
        text += f"\ndamaged and left out: episodes {', '.join(map(str, sorted(report.left_out)))}"
    write_result(report._asdict(), text, json)
    return 0
