"""`lara health`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..lam.health.page import write_health_page
from ..lam.health.report import examine
from ..lam.processes import is_first
from ..storage.files import check_folder
from .arguments import takes
from .output import write_result

__all__ = ["health"]


@takes(examine, positional=("lam", "data"), omit=("thresholds",))
def health(*, html: Path | None = None, json: bool = False, **arguments: Any) -> int:
    """Is this latent action model any good on this data? Reconstruction, codes, collapse, frame gap, motion; and advice.

    Several processes: accelerate launch -m lara_adapter.cli health ... Exit status: 0 healthy; 1 a threshold failed; 2 the
    question cannot be answered.

    Args:
        html: also write the report as one page, with curves over the gaps (extra report).
    """
    if html is not None:
        check_folder("html", html.parent)
    report = examine(**arguments)
    if is_first():
        if html is not None:
            write_health_page(report, html)
        write_result(report.to_dict(), str(report), json)
    return 0 if report.ok else 1
