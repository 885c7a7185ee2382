"""`lara label`."""

from __future__ import annotations

from typing import Any

from ..data.sources import shown
from ..lam.label.run import label_dataset
from ..lam.processes import is_first
from .arguments import takes
from .output import write_result

__all__ = ["label"]


@takes(label_dataset, positional=("dataset",))
def label(*, json: bool = False, **arguments: Any) -> int:
    """Write the latent action of every frame of a LeRobot-format dataset: as features of a copy, or as a parquet sidecar.

    A run that was killed is continued by the same command. Several processes: accelerate launch -m lara_adapter.cli label
    ...; or --shard 0/4 to 3/4, and then --merge. Exit status: 0, also where damaged episodes were left out; 2 if something
    is wrong with the arguments, the dataset or the model.
    """
    report = label_dataset(**arguments)
    if not is_first():
        return 0
    columns = "indices, latent, valid" if arguments["sidecar"] else ", ".join(report.features)
    if arguments["sidecar"] and report.actions:
        columns += ", action"
    resumed = f", {report.resumed} of them labelled before" if report.resumed else ""
    text = f"{shown(report.output)}: {columns} of {report.frames} frames in {report.episodes} episodes{resumed}\n"
    text += (
        f"{report.invalid} frames without a future within the episode (valid is False); {report.codes_used} codes used"
    )
    if report.actions:
        low, high = report.actions["r2_interval"]
        text += (
            f"\nactions: R2 {report.actions['r2']:.2f} ({low:.2f} to {high:.2f}) on demonstrations left out of the fit, "
            f"{report.actions['episodes']} episodes"
        )
    if report.left_out:
        text += f"\ndamaged and left out: episodes {', '.join(report.left_out)}"
    if report.not_selected:
        text += f"\nnot selected: episodes {', '.join(report.not_selected)}"
    if arguments["shard"] is not None:
        text += "\nthis shard is done; when all are: the same command with --merge in place of --shard"
    write_result(report._asdict(), text, json)
    return 0
