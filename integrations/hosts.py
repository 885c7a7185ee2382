"""The hosts: how to install them, the error where one is missing, and what is replaced in them for the time of a run."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from lara_adapter.errors import HostNotInstalled

__all__ = ["INSTALL", "first_line", "import_host", "lazy", "replaced"]

INSTALL = {
    "gr00t": "git clone -b n1.6-release https://github.com/NVIDIA/Isaac-GR00T, install it as its README says (or put the "
    "checkout on PYTHONPATH), and pip install lara-adapter into the same environment; tested with N1.6, Python 3.10, torch "
    "2.7.1, transformers 4.51.3",
    "lerobot": "pip install 'lerobot[training,groot,pi,smolvla,multi-task-dit]==0.6.1', the version it was tested with",
    "openpi": "git clone https://github.com/Physical-Intelligence/openpi and install it as its README says, with its "
    "patched transformers (src/openpi/models_pytorch/transformers_replace), or pip install rlinf-openpi==0.1.1 "
    "rlinf-transformer-openpi==4.53.2 lerobot==0.3.3, and pip install lara-adapter into the same environment; tested with "
    "Python 3.12, torch 2.7.1",
}


def import_host(name: str, reason: str = "") -> Any:
    """Import a module of a host, a key of INSTALL.

    Raises:
        HostNotInstalled: the module, or something that it imports, is not installed; the message begins with `reason`.
    """
    host = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{reason}{host} cannot be imported here ({first_line(error)}): {INSTALL[host]}"
        raise HostNotInstalled(message) from error


def lazy(package: str, **modules: str) -> Callable[[str], Any]:
    """A `__getattr__` for a host's package: serving a policy imports the package and must load no part of LARA.

    Args:
        package: its `__name__`.
        **modules: module -> the names that the package has from it.
    """
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    return get


@contextlib.contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Within this context a module has other values under these names."""
    before = {name: getattr(module, name) for name in values}
    try:
        vars(module).update(values)
        yield
    finally:
        vars(module).update(before)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
