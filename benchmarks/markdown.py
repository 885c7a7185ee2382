"""Tables, paragraphs and lists in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 140


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Text wrapped, whatever its white space; `first` and `rest` begin its lines."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def bullets(*texts: str) -> str:
    """A list."""
    return "\n".join(paragraph(text, "- ", "  ") for text in texts)


def spread(middle: float, low: float, high: float) -> str:
    """A median and its range."""
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"
