"""Format tables (lists of rows of cells) for a terminal or as Markdown."""

from __future__ import annotations

import textwrap

Rows = list[list[str]]


def aligned(rows: Rows) -> str:
    """Format a table for a terminal: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def wrapped(text: str, width: int = 110) -> str:
    """Format a sentence as a list item."""
    return textwrap.fill(text, width, subsequent_indent="  ", initial_indent="- ")


def markdown_table(rows: Rows) -> str:
    """Format a table as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(["---"] + ["---:"] * (len(rows[0]) - 1)) + "|", *lines[1:]])
