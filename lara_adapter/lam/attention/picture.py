"""The picture of an attention report. Needs matplotlib."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ...errors import LaraArgumentError
from ...storage.files import replace_file
from .report import AttentionReport

__all__ = ["draw"]

_SIDE = 1.7  # inches per picture


def draw(report: AttentionReport, path: str | os.PathLike[str], *, queries: bool = False) -> None:
    """Write a grid as PNG, atomically: a row per pair; both frames, then for each model its attention over both.

    Heat is attention over evenly spread attention, on one scale for all of the grid, so that models can be compared.

    Args:
        report: of :func:`~lara_adapter.lam.attention.report.measure_attention`.
        path: the file.
        queries: one column per query and frame instead of their mean.

    Raises:
        LaraArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LaraArgumentError("pictures need matplotlib: pip install 'lara-adapter[viz]'") from error
    columns = _columns(report, queries)
    top = max(float(np.quantile(heat, 0.999)) for _, heats in columns for heat in heats)
    rows, width = len(report.pairs), 2 + len(columns) * 2
    figure = Figure(figsize=(_SIDE * width + 0.8, _SIDE * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, width, squeeze=False)
    scale = Normalize(0, max(top, 1e-6))
    for row, (name, place) in enumerate(report.pairs):
        frames = report.present[row], report.future[row]
        for column, title in enumerate((f"{name}, frame {place}", f"frame {place + report.gap}")):
            _show(axes[row, column], frames[column], title)
        for number, (title, heats) in enumerate(columns):
            for side in (0, 1):
                axis = axes[row, 2 + 2 * number + side]
                _show(axis, frames[side], f"{title}\n{('present', 'future')[side]}" if row == 0 else "")
                height, breadth = frames[side].shape[:2]
                axis.imshow(
                    heats[row, side], cmap="inferno", norm=scale, alpha=0.65, interpolation="bilinear",
                    extent=(-0.5, breadth - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
    bar = figure.colorbar(ScalarMappable(scale, "inferno"), ax=axes, fraction=0.02, pad=0.01)
    bar.set_label("attention / even", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(f"{report.data}: what the M-Former's queries look at, frame gap {report.gap}", fontsize=9)
    with replace_file(path) as fresh:
        figure.savefig(fresh, dpi=110, format="png")


def _columns(report: AttentionReport, queries: bool) -> list[tuple[str, np.ndarray]]:
    """(title, heat [P, 2, h, w]: attention over evenly spread attention)."""
    columns = []
    for model in report.models:
        maps = model.maps(report.layer)
        maps = maps * (maps.shape[2] * maps.shape[3] * maps.shape[4])
        if queries:
            columns += [(f"{model.name} query {n}", maps[:, n]) for n in range(maps.shape[1])]
        else:
            columns.append((model.name, maps.mean(axis=1)))
    return columns


def _show(axis: Any, frame: np.ndarray, title: str) -> None:
    axis.imshow(frame)
    axis.set_axis_off()
    if title:
        axis.set_title(title, fontsize=6)
