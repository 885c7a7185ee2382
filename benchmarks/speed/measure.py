"""Arms that take turns, so that a machine that slows down slows all of them; peak memory; what the numbers come from."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lara_adapter import __version__
from lara_adapter.storage.files import write_json


def take_turns(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every arm once a round, in turn and in reverse; what each returned, round by round."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in arms if number % 2 == 0 else reversed(arms):
            found[name].append(arms[name]())
    return found


def ratios(found: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Each round's ratio to the same round of an arm."""
    return {name: [mine / other for mine, other in zip(values, found[base])] for name, values in found.items()}


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    """The median of each arm."""
    return {name: median(values) for name, values in found.items()}


def ranges(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Lowest and highest of each arm."""
    return {name: [min(values), max(values)] for name, values in found.items()}


def peak_mb(work: Callable[[], Any], device: str) -> float:
    """Peak memory of `work` in MB beyond what stood before; on a CPU it runs twice, and this process counts as a whole."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: building the model is not the step
    before = _resident("VmRSS")
    for _ in range(2):
        work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[field].split()[0]) / 1e3


def environment(device: str, packages: Iterable[str] = ("torch",)) -> dict[str, str]:
    """Versions, and the GPU by name or the number of CPU cores."""
    machine = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {"lara_adapter": __version__, "python": platform.python_version(), "machine": machine, **versions}


def finish(report: dict[str, Any], table: str, out: Path) -> int:
    """Write the record, print the table; returns the exit status."""
    write_json(out, report)
    print(table)
    print(f"written to {out}")
    return 0
