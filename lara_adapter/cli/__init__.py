"""The command line `lara`: one function per command, its arguments parsed by tyro from the function's signature.

A command returns its exit status and writes its result through :func:`write`; everything else it has to say is logging,
on stderr. A :class:`LaraError` is one line on stderr and status 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..errors import LaraError
from .output import write

__all__ = ["COMMANDS", "Command", "main"]

REFUSED = 2  # exit status: the question could not be answered; 1: the answer is no


class Command(NamedTuple):
    """One command: "module:function", imported when it is called, and a line of help."""

    function: str
    help: str


COMMANDS = {
    "convert": Command(
        "lara_adapter.cli.convert:convert",
        "a latent action model of LARA's authors or Moto's into ours, and back",
    ),
    "inspect": Command(
        "lara_adapter.cli.inspect:inspect_policy", "what LARA would do with a policy: blocks, tap, tokens, size"
    ),
    "label": Command(
        "lara_adapter.cli.lam:label", "write the latent action of every frame of a LeRobot-format dataset"
    ),
    "health": Command("lara_adapter.cli.lam:health", "is this latent action model any good on this data?"),
    "attention": Command("lara_adapter.cli.lam:attention", "what a latent action model looks at, as pictures"),
    "train-lam": Command(
        "lara_adapter.cli.train_lam:train_lam", "pre-train a latent action model on folders of unlabelled video"
    ),
    "serve": Command("lara_adapter.cli.serve:serve", "serve a policy over ZMQ, in GR00T's wire protocol"),
    "eval": Command("lara_adapter.cli.evaluate:evaluate", "let a served policy act in a simulator, and count"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: command and arguments; None: those of the process.

    Returns:
        The exit status: 0; 1 where the answer is no; 2 for wrong arguments and every LaraError.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        write(_usage())
        return 0 if arguments else REFUSED
    if arguments[0] == "--version":
        from .._version import __version__

        write(f"lara-adapter {__version__}")
        return 0
    name = arguments[0]
    command = COMMANDS.get(name)
    if command is None:
        return _refuse(f"there is no command {name!r}; there is {', '.join(COMMANDS)}")
    try:
        import tyro
    except ImportError:
        return _refuse("the command line needs tyro: pip install 'lara-adapter[cli]'")
    try:
        # tyro itself ends the process for --help (0) and for arguments that do not parse (2)
        return int(tyro.cli(_load(command.function), prog=f"lara {name}", args=arguments[1:]))
    except LaraError as error:
        return _refuse(f"{name}: {error}")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return f"usage: lara COMMAND ...\n\n{listed}\n\nlara COMMAND --help: its arguments; lara --version"


def _load(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


def _refuse(message: str) -> int:
    sys.stderr.write("lara: " + " ".join(message.split()) + "\n")
    return REFUSED
