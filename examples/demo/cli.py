"""The command line of the demos: presets and flags, checked; and how a run ends."""

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
        presets: by name; the first one is the default.
        arguments: the command line.
        about: what --help says first.
    """
    name = default = next(iter(presets))
    for index, argument in enumerate(arguments):
        if argument.startswith("--preset"):
            name = argument.partition("=")[2] or (arguments[index + 1] if index + 1 < len(arguments) else name)
    return tyro.cli(kind, default=presets.get(name, presets[default]), args=arguments, description=about)


def check_settings(settings: Any) -> None:
    """Refuse numbers below 1 (a seed below 0), more actions than a chunk has, and an empty or repeated list.

    Raises:
        ValueError: it names the flag.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        least = 0 if field.name == "seed" else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: a number >= {least} is expected")
    if settings.execute > HORIZON:
        raise ValueError(f"--execute {settings.execute}: a chunk has {HORIZON} actions")
    for name, one in (("tasks", "task"), ("seeds", "seed")):
        values = getattr(settings, name, None)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError(
                f"--{name} {' '.join(map(str, values))}: at least one {one} is expected, and each only once"
            )


def exit_status(work: Callable[[], str | None], *unusable: type[Exception]) -> int:
    """Run a demo to its end.

    Args:
        work: does everything; what it returns is printed with the time that it took.
        unusable: more exceptions, beside a missing OpenGL, that say why it cannot be run at all.

    Returns:
        0; 1 where a stage failed; 2 where it cannot be run; 130 after Ctrl-C.
    """
    begin = time.perf_counter()
    try:
        said = work()
    except (GLMissing, *unusable) as problem:
        print(problem, file=sys.stderr)
        return 2
    except StageFailed as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last finished stage.", file=sys.stderr)
        return 130
    if said is not None:
        minutes, rest = divmod(round(time.perf_counter() - begin), 60)
        print(f"{said}   ({minutes} min {rest} s)")
    return 0
