"""Code that is on no registry: a checkout that a flag or an environment variable names."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


class Missing(RuntimeError):
    """The external code, or a package that it needs, is not installed."""


def add_checkout(source: str | Path, name: str, *, contains: str, folders: tuple[str, ...] = ("",)) -> Path:
    """Make a checkout importable.

    Args:
        source: the checkout.
        name: what it should be a checkout of, for the message.
        contains: a path that it must have.
        folders: those of its folders that hold packages.

    Returns:
        The checkout as an absolute path.

    Raises:
        Missing: it is not a checkout of that.
    """
    root = Path(source).expanduser().resolve()
    if not (root / contains).exists():
        raise Missing(f"{source} is not a checkout of {name}: it has no {contains}")
    for folder in reversed(folders):
        if str(root / folder) not in sys.path:
            sys.path.insert(0, str(root / folder))
    return root


def lara_full(text: str) -> Path:
    """The type of an argparse argument: a checkout of LARA_full, importable from then on."""
    try:
        return add_checkout(text, "LARA_full", contains="moto")
    except Missing as error:
        raise argparse.ArgumentTypeError(str(error)) from None
