"""Tables as lists of rows of cells, laid out for a terminal or as Markdown."""

from __future__ import annotations

import textwrap

Rows = list[list[str]]


def aligned(rows: Rows) -> str:
    """Lay a table out for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def wrapped(text: str, width: int = 110) -> str:
    """Lay a sentence out as an item of a list."""
    return textwrap.fill(text, width, subsequent_indent="  ", initial_indent="- ")


def markdown_table(rows: Rows) -> str:
    """Lay a table out as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|", *lines[1:]])
