"""Command line shared by examples.demo and examples.refine_lam: presets, flags, exit status."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tyro

from examples.demo.data import HORIZON
from examples.demo.stages import StageFailed
from examples.metaworld_sim import GLMissing

Settings = TypeVar("Settings")


def read_presets(kind: type[Settings], presets: Mapping[str, Settings], arguments: list[str], about: str) -> Settings:
    """Read a command line: the preset gives the defaults, flags change them.

    Args:
        kind: dataclass of the settings, with a field `preset`.
        presets: settings by name; the first one is the default.
        arguments: the command line.
        about: description printed by --help.
    """
    name = default = next(iter(presets))
    for index, argument in enumerate(arguments):
        if argument.startswith("--preset"):
            name = argument.partition("=")[2] or (arguments[index + 1] if index + 1 < len(arguments) else name)
    return tyro.cli(kind, default=presets.get(name, presets[default]), args=arguments, description=about)


def check_settings(settings: Any) -> None:
    """Refuse numbers below 1 (a seed below 0), more actions than a chunk has, and empty lists or lists with repetitions.

    Raises:
        ValueError: a setting is out of range; the message names the flag.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        least = 0 if field.name == "seed" else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: expected a number >= {least}")
    if settings.execute > HORIZON:
        raise ValueError(f"--execute {settings.execute}: a chunk has {HORIZON} actions")
    for name, one in (("tasks", "task"), ("seeds", "seed")):
        values = getattr(settings, name, None)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(f"--{name} {' '.join(map(str, values))}: expected at least one {one}, and each only once")


def exit_status(work: Callable[[], str | None], *unusable: type[Exception]) -> int:
    """Run an example and turn its outcome into an exit status.

    Args:
        work: runs everything; its return value is printed with the time it took.
        unusable: exceptions, besides a missing OpenGL, that mean that it cannot run at all.

    Returns:
        0; 1 if a stage failed; 2 if it cannot run; 130 after Ctrl-C.
    """
    begin = time.perf_counter()
    try:
        closing = work()
    except (GLMissing, *unusable) as problem:
        print(problem, file=sys.stderr)
        return 2
    except StageFailed as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes after the last finished stage.", file=sys.stderr)
        return 130
    if closing is not None:
        minutes, rest = divmod(round(time.perf_counter() - begin), 60)
        print(f"{closing}   ({minutes} min {rest} s)")
    return 0
