"""`lara attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..lam.attention.picture import draw
from ..lam.attention.report import measure_attention, save_arrays
from ..storage.files import check_folder
from .arguments import takes
from .output import write_result

__all__ = ["attention"]


@takes(measure_attention, draw, positional=("lam", "data"), omit=("report", "path"))
def attention(*, output: Path, queries: bool, json: bool = False, **arguments: Any) -> int:
    """What a latent action model looks at: attention.png and attention.npz in a folder, and a few numbers.

    Exit status: 0; 2 if something is wrong with the arguments, the data or a model.

    Args:
        output: folder for attention.png and attention.npz.
    """
    report = measure_attention(**arguments)
    check_folder("output", output)
    draw(report, output / "attention.png", queries=queries)
    save_arrays(report, output / "attention.npz")
    models = report.numbers()
    width = max(len(model["model"]) for model in models)
    lines = [
        f"{output}: attention.png and attention.npz of {len(report.pairs)} pairs {report.gap} frames apart",
        f"{'model':<{width}}  on motion  on the present frame  entropy / even",
    ]
    for model in models:
        motion = "none" if model["on_motion"] is None else f"x {model['on_motion']:.2f}"
        lines.append(f"{model['model']:<{width}}  {motion:>9}  {model['present']:>20.0%}  {model['entropy']:>14.2f}")
    content = {"output": str(output), "pairs": len(report.pairs), "gap": report.gap, "models": models}
    write_result(content, "\n".join(lines), json)
    return 0
