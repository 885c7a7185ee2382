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

__all__ = ["Bars", "Curves", "Film", "Picture", "Table", "Text", "write_page"]

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


def write_page(file: Path, title: str, summary: str, parts: Sequence[NamedTuple]) -> Path:
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
        raise HostNotInstalled(f"a report as HTML needs jinja2 ({error}): pip install 'lara-adapter[report]'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(embedded=_embedded, plot=_plot, share=lambda value: f"{100 * value:.2f}")
    text = environment.from_string(_TEMPLATE).render(title=title, summary=summary, parts=parts)
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


_TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,"><title>{{ title }}</title><style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --ok: #2b8a3e; --fail: #c92a2a; --note: #b86200; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { margin: 0.5rem 0 0; font-size: 1.6rem; overflow-wrap: anywhere } h2 { margin: 2rem 0 0.5rem; font-size: 1.15rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: left; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
p.note, figcaption { color: #777; font-size: 0.9rem; margin: 0.3rem 0 } li { margin: 0.4rem 0; overflow-wrap: anywhere }
ul { list-style: none; padding: 0 } li.ok::before { content: "ok "; color: var(--ok); font-weight: 600 }
li.fail::before { content: "fail "; color: var(--fail); font-weight: 600 }
li.note::before { content: "note "; color: var(--note); font-weight: 600 }
.bar { position: relative; height: 1.1rem; background: var(--soft); border-radius: 3px; margin: 0.15rem 0 0.7rem }
.bar b { position: absolute; inset: 0 auto 0 0; background: #3b5bdb99; border-radius: 3px }
.bar i { position: absolute; top: 0.5rem; height: 0.1rem; background: currentColor }
img, video, svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: currentColor }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem } figure { margin: 0 }
.films video, .films img { width: 100% } .key { display: inline-block; margin-right: 1rem } .key b { font-size: 1.3em }
</style></head><body><h1>{{ title }}</h1><p>{{ summary }}</p>
{% for part in parts %}
<section><h2>{{ part.title }}</h2>
{% if part.kind == "text" %}
<ul>{% for state, line in part.lines %}<li class="{{ state }}">{{ line }}</li>{% endfor %}</ul>
{% elif part.kind == "table" %}
<div class="scroll"><table><tr>{% for cell in part.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% elif part.kind == "bars" %}
{% for name, (value, low, high, text) in part.rows.items() %}
<div>{{ name }}: {{ text }}</div><div class="bar"><b style="width: {{ share(value) }}%"></b>
<i style="left: {{ share(low) }}%; width: {{ share(high - low) }}%"></i></div>
{% endfor %}
{% elif part.kind == "curves" %}
{% set drawn = plot(part) %}
<svg viewBox="0 0 640 250" width="640" role="img" aria-label="{{ part.title }}">
{% for y, label in drawn.y_ticks %}<path d="M60 {{ y }} H620" stroke="#8884"/><text x="54" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
{% endfor %}{% for x, label in drawn.x_ticks %}<text x="{{ x }}" y="228" text-anchor="middle">{{ label }}</text>
{% endfor %}<text x="340" y="245" text-anchor="middle">{{ part.x }}</text>
{% for line in drawn.lines %}<path d="{{ line.path }}" fill="none" stroke="{{ line.colour }}" stroke-width="2"/>
{% for x, y in line.points %}<circle cx="{{ x }}" cy="{{ y }}" r="{{ 3 if line.points | length < 40 else 0 }}" fill="{{ line.colour }}"/>{% endfor %}

{% endfor %}</svg>
<div>{% for line in drawn.lines %}<span class="key"><b style="color: {{ line.colour }}">&#9632;</b> {{ line.name }}</span>{% endfor %}</div>
{% elif part.kind == "picture" %}
{% set source = embedded(part.file) %}
{% if source %}<img alt="{{ part.title }}" src="{{ source }}">{% else %}<p>{{ part.file.name }} is not shown.</p>{% endif %}

{% elif part.kind == "films" %}
<div class="films">{% for caption, file in part.files.items() %}<figure>{% set source = embedded(file) %}
{% if source and file.suffix == ".mp4" %}<video controls loop muted playsinline preload="metadata" src="{{ source }}"></video>
{% elif source %}<img alt="{{ caption }}" src="{{ source }}">{% else %}<p>{{ file.name }} is not shown.</p>{% endif %}
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}</div>
{% endif %}
{% if part.note is defined and part.note %}<p class="note">{{ part.note }}</p>{% endif %}
</section>
{% endfor %}
</body></html>
"""
