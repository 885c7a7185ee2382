"""Import other people's code from a checkout, without leaving a trace in the process.

Checkouts of different projects have packages of the same name (`models` in RDT and in DexVLA), and import much that
no tiny build needs (simulators, flash attention). So each is imported on its own: its folder in front of sys.path,
empty modules for what is missing, and both gone afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging.config
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "LARA_HEADS_SRC"


def checkout(name: str) -> Path:
    """Folder of a checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    root = os.environ.get(VARIABLE)
    path = Path(root or "", name).resolve()
    if not root or not path.is_dir():
        raise FileNotFoundError(f"{path}: {VARIABLE} names the folder with the checkouts; see make test-heads")
    return path


class _Empty(types.ModuleType):
    """A module in which every name is an empty class that can be called, subclassed and used as a decorator."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (_Anything,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Anything:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == stub or name.startswith(f"{stub}.") for stub in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Empty(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def imported(*folders: Path, empty: tuple[str, ...] = ()) -> Iterator[None]:
    """Imports inside look into `folders` first and find empty modules under the names in `empty`.

    Afterwards the modules from `folders` and the empty ones are forgotten; classes and functions of theirs work on.
    """
    before, path, finder = dict(sys.modules), list(sys.path), _Finder(empty)
    configure = logging.config.dictConfig
    for name in [n for n in before if n.partition(".")[0] in {f.name for d in folders for f in d.iterdir()}]:
        if not name.startswith(("lara_adapter", "helpers", "tests")):
            del sys.modules[name]
    sys.path[:0] = [str(folder) for folder in folders]
    sys.meta_path.insert(0, finder)
    logging.config.dictConfig = lambda config: None  # starVLA switches off every logger that is there
    try:
        yield
    finally:
        logging.config.dictConfig = configure
        sys.meta_path.remove(finder)
        sys.path[:] = path
        for name in [name for name, module in sys.modules.items() if _is_from(module, folders)]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def _is_from(module: Any, folders: tuple[Path, ...]) -> bool:
    entries = getattr(module, "__dict__", {})
    places = [str(entries.get("__file__")), *map(str, entries.get("__path__", []))]  # a namespace package has no file
    inside = any(place.startswith(f"{folder}{os.sep}") for place in places for folder in folders)
    return isinstance(module, _Empty) or inside
