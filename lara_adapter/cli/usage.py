"""`lara COMMAND --help`: an example, what the command is for, and the flags that most people need, on one screen."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["WIDTH", "short_help"]

WIDTH = 100  # at most


def short_help(name: str, command: Callable[..., int], examples: Sequence[str], common: Sequence[str]) -> str:
    """The help of a command.

    Args:
        name: of the command.
        command: made by :func:`.arguments.takes`: its parameters carry their help.
        examples: command lines, without `lara`.
        common: parameters to show beside those that must be given.
    """
    columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    parameters = inspect.signature(command).parameters
    alone = [key for key, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    needed = [key for key, p in parameters.items() if p.default is p.empty and key not in alone]
    rows = [
        (key.upper() if key in alone else "--" + key.replace("_", "-"), _described(parameters[key]))
        for key in dict.fromkeys([*alone, *needed, *common])
    ]
    width = max(len(flag) for flag, _ in rows)
    lines = [f"lara {example}" for example in examples]
    purpose = inspect.cleandoc(command.__doc__ or "").split("\n\n")[0]
    lines += ["", *textwrap.wrap(" ".join(purpose.split()), columns), ""]
    for flag, text in rows:
        lines += textwrap.wrap(
            text, columns, initial_indent=f"  {flag:<{width}}  ", subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )  # fmt: skip
    flags = sum(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    shown = sum(flag.startswith("--") for flag, _ in rows)
    if flags > shown:
        lines += ["", f"lara {name} --help-all: all {flags} flags"]
    return "\n".join(lines)


def _described(parameter: inspect.Parameter) -> str:
    """The first sentence of a parameter's help, with its default."""
    help_text = next(each.help for each in parameter.annotation.__metadata__ if getattr(each, "help", None))
    text = re.split(r"(?<=\.) ", help_text, maxsplit=1)[0].rstrip(".")
    default: Any = parameter.default
    plain = default is not parameter.empty and default not in (None, (), "") and not isinstance(default, bool)
    return f"{text} (default: {default})" if plain else text
