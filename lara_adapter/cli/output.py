"""Results of commands, on stdout; everything else that a command reports is logged, on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["write", "write_result"]


def write(text: str) -> None:
    """Write to stdout; nothing else in the package does."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def write_result(content: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Write a result, as JSON (NaN is an error) or as text."""
    write(json.dumps(content, indent=2, allow_nan=False) if as_json else text)
