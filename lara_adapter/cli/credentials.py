"""The token of a policy server: never an argument, which every user of the machine could read."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LaraArgumentError

__all__ = ["TOKEN_VARIABLE", "read_token"]

TOKEN_VARIABLE = "LARA_API_TOKEN"


def read_token(file: Path | None) -> str | None:
    """The token in a file, else the one in the environment, else None.

    Raises:
        LaraArgumentError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaraArgumentError(f"token_file: {file} cannot be read: {error}") from error
    if not token:
        raise LaraArgumentError(f"token_file: {file} is empty")
    return token
