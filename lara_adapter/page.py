"""A report as one HTML file: text, tables, curves, pictures and films, which asks nothing of a network or a server.

Everything that is shown is escaped by the template; the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import HostNotInstalled
from .storage.files import replace_file

__all__ = ["Bars", "Curves", "Film", "Part", "Picture", "Table", "Text", "write_page"]

_TEMPLATE = Path(__file__).with_suffix(".html")
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".mp4": "video/mp4", ".gif": "image/gif"}
_LARGEST = 64 * 2**20  # bytes of a film or picture; a larger one is named
_COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#862e9c", "#0b7285", "#c92a2a")


class Text(NamedTuple):
    """Paragraphs or lines, each with a state that colours it: "ok", "fail", "note" or ""."""

    title: str
    lines: Sequence[tuple[str, str]]
    kind: str = "text"


class Table(NamedTuple):
    """A table of anything that can be written."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    kind: str = "table"


class Bars(NamedTuple):
    """Shares in [0, 1], each with its interval and a text: name -> (share, low, high, text)."""

    title: str
    rows: Mapping[str, tuple[float, float, float, str]]
    note: str = ""
    kind: str = "bars"


class Curves(NamedTuple):
    """Lines over one axis: name -> points. NaN leaves a gap."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    note: str = ""
    kind: str = "curves"


class Picture(NamedTuple):
    """A picture of a file."""

    title: str
    file: Path
    note: str = ""
    kind: str = "picture"


class Film(NamedTuple):
    """Films side by side: caption -> file, an .mp4 or .gif."""

    title: str
    files: Mapping[str, Path]
    kind: str = "films"


Part = Text | Table | Bars | Curves | Picture | Film


def write_page(file: Path, title: str, summary: str, parts: Sequence[Part]) -> Path:
    """Write a page, atomically.

    Args:
        file: where.
        title: of the page.
        summary: one line below it.
        parts: what it shows, in order.

    Returns:
        The file.

    Raises:
        HostNotInstalled: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise HostNotInstalled(
            f"a report as HTML needs jinja2 ({error}): pip install 'lara-adapter[report]'"
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(embedded=_embedded, plot=_plot, share=lambda value: f"{100 * value:.2f}")
    text = environment.from_string(_TEMPLATE.read_text("utf-8")).render(title=title, summary=summary, parts=parts)
    with replace_file(file) as fresh:
        Path(fresh).write_text(text, encoding="utf-8")
    return file


def _embedded(file: Path) -> str | None:
    """A file as an address that holds it; None where it is missing or too large."""
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return None
    return f"data:{_TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _plot(curves: Curves) -> dict[str, Any]:
    """What the template draws: paths in a box of 640 x 240, ticks, and the names with their colours."""
    points = [point for line in curves.lines.values() for point in line if math.isfinite(point[1])]
    xs, ys = [x for x, _ in points] or [0.0, 1.0], [y for _, y in points] or [0.0, 1.0]
    left, right, low, high = min(xs), max(xs), min(0.0, *ys), max(ys)
    width, height = (right - left) or 1.0, (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return round(60 + 560 * (x - left) / width, 1), round(210 - 190 * (y - low) / height, 1)

    lines = []
    for number, (name, line) in enumerate(curves.lines.items()):
        placed = [place(x, y) if math.isfinite(y) else None for x, y in line]
        path, pen = "", "M"
        for point in placed:
            path += "" if point is None else f"{pen}{point[0]} {point[1]} "
            pen = "M" if point is None else "L"
        colour = _COLOURS[number % len(_COLOURS)]
        lines.append({"name": name, "path": path, "colour": colour, "points": [point for point in placed if point]})
    return {
        "lines": lines,
        "y_ticks": [(place(left, low + height * part)[1], f"{low + height * part:.3g}") for part in (0, 0.5, 1)],
        "x_ticks": [(place(x, low)[0], f"{x:.4g}") for x in dict.fromkeys((left, (left + right) / 2, right))],
    }
