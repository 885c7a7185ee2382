"""Results of commands, on stdout; everything else a command has to say is logging, on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

__all__ = ["to_json", "write"]


def write(text: str) -> None:
    """Write a result to stdout: the one place of the package that does."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def to_json(content: dict[str, Any]) -> str:
    """A result as JSON text; NaN has no place in it."""
    return json.dumps(content, indent=2, allow_nan=False)
