"""`lara label`."""

from __future__ import annotations

from typing import Any

from ..lam.label.run import label_dataset
from .arguments import takes
from .output import write_result

__all__ = ["label"]


@takes(label_dataset, positional=("dataset",))
def label(*, json: bool = False, **arguments: Any) -> int:
    """Write the latent action of every frame of a LeRobot-format dataset: as features of a copy, or as a parquet sidecar.

    A run that was killed is continued by the same command. Exit status: 0; 2 if something is wrong with the arguments,
    the dataset or the model.
    """
    report = label_dataset(**arguments)
    columns = "indices, latent, valid" if arguments["sidecar"] else ", ".join(report.features)
    resumed = f", {report.resumed} of them labelled before" if report.resumed else ""
    text = f"""{report.output}: {columns} of {report.frames} frames in {report.episodes} episodes{resumed}
{report.invalid} frames without a future within the episode (valid is False); {report.codes_used} codes used"""
    write_result(report._asdict(), text, json)
    return 0
