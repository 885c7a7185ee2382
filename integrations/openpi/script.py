"""openpi's training script: a file of its repository, which no wheel has."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from lara_adapter import HostNotInstalled

from ..hosts import import_host

__all__ = ["TESTED", "find_training_script", "load_training_script"]

TESTED = "tested with openpi at 15a9616 and with rlinf-openpi 0.1.1, lerobot 0.3.3"
SOURCE_VARIABLE = "LARA_OPENPI_SRC"
_SCRIPT = Path("scripts") / "train_pytorch.py"
_GLOBALS = ("train_loop", "build_datasets", "safetensors", "save_checkpoint", "load_checkpoint")


def find_training_script(source: str | Path | None = None) -> Path:
    """openpi's scripts/train_pytorch.py.

    Args:
        source: a checkout of openpi, or the script itself; None: the environment variable LARA_OPENPI_SRC, else the
            checkout that openpi is installed from.

    Raises:
        HostNotInstalled: openpi cannot be imported, or there is no such script.
    """
    package = import_host("openpi")
    named = source or os.environ.get(SOURCE_VARIABLE)
    if named:
        path = Path(named).expanduser()
        script = path / _SCRIPT if path.is_dir() else path
        if script.is_file():
            return script.resolve()
        raise HostNotInstalled(f"{named} is not a checkout of openpi: it has no {_SCRIPT}")
    script = Path(package.__file__).resolve().parents[2] / _SCRIPT  # <checkout>/src/openpi/__init__.py
    if script.is_file():
        return script
    raise HostNotInstalled(
        f"openpi's training loop is a script of its repository, and no wheel has it: git clone "
        f"https://github.com/Physical-Intelligence/openpi and name the checkout, with --openpi PATH or {SOURCE_VARIABLE}"
    )


def load_training_script(source: str | Path | None = None) -> Any:
    """openpi's scripts/train_pytorch.py as a module of its own.

    Raises:
        HostNotInstalled: see :func:`find_training_script`, or the script is not the one this was written for.
    """
    path = find_training_script(source)
    spec = importlib.util.spec_from_file_location("openpi_train_pytorch", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise HostNotInstalled(f"{path} needs {error.name}: pip install {error.name}") from error
    missing = [name for name in _GLOBALS if not hasattr(module, name)]
    if missing:
        raise HostNotInstalled(
            f"{path} has no {missing}; {TESTED}. Attach in your own loop instead: attach(policy, lam) and "
            "create_data_loader(config)"
        )
    return module
