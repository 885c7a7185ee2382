"""The command line `lara`: one function per command, its arguments parsed by tyro from the function's signature.

A command returns its exit status and writes its result through :func:`write`; everything else it has to say is logging,
on stderr. A :class:`LaraError` is one line on stderr and status 2.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from .errors import LaraError

__all__ = ["COMMANDS", "Command", "main", "to_json", "write"]

logger = logging.getLogger(__name__)

FAILED, REFUSED = 1, 2  # exit status: the answer is no; the question could not be answered


class Command(NamedTuple):
    """One command: "module:function", imported when it is called, and a line of help."""

    function: str
    help: str


COMMANDS = {
    "convert": Command(
        "lara_adapter.lam.convert.command:convert",
        "a latent action model of LARA's authors or Moto's into ours, and back",
    ),
    "inspect": Command(
        "lara_adapter.cli:inspect_policy", "what LARA would do with a policy: blocks, tap, tokens, size"
    ),
    "label": Command(
        "lara_adapter.lam.commands:label", "write the latent action of every frame of a LeRobot-format dataset"
    ),
    "health": Command("lara_adapter.lam.commands:health", "is this latent action model any good on this data?"),
    "attention": Command("lara_adapter.lam.commands:attention", "what a latent action model looks at, as pictures"),
    "train-lam": Command(
        "lara_adapter.lam.pretrain_cli:train_lam", "pre-train a latent action model on folders of unlabelled video"
    ),
    "serve": Command("lara_adapter.serving.command:serve", "serve a policy over ZMQ, in GR00T's wire protocol"),
    "eval": Command("lara_adapter.evaluation.command:evaluate", "let a served policy act in a simulator, and count"),
}


def write(text: str) -> None:
    """Write a result to stdout: the one place of the package that does."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


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
        from . import __version__

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


# ---------------------------------------------------------------------- commands


def inspect_policy(
    source: str,
    /,
    *,
    lam: str | None = None,
    layer: int | str = -3,
    blocks: str | None = None,
    token: int | str = "last_valid",
    projector: Literal["mlp", "linear"] = "mlp",
    train_lam: bool = True,
    json: bool = False,
) -> int:
    """What LARA would do with a policy: blocks, tap, action tokens, frames, parameters added. Nothing is attached.

    Exit status: 0; 1 if LARA cannot attach; 2 if the policy or the LAM cannot be opened.

    Args:
        source: folder or Hub id of a checkpoint (only its config.json is read), or a function that returns a policy:
            package.module:function or path/to/file.py:function.
        lam: folder or Hub id of a latent action model; without it the paper's is assumed.
        layer: which hidden state: -1 after the last block, -3 the paper's, k after block k, "L-2".
        blocks: dotted path of the diffusion transformer's blocks; without it they are found.
        token: last_valid, mean_valid, last, or a step of the action chunk.
        projector: mlp (the paper's) or linear (the official release's).
        train_lam: whether the latent action model trains along.
        json: print JSON instead of text.
    """
    from .integrations.loading import open_policy
    from .report import describe_policy

    # what hosts print while they build a policy would stand before the result
    with contextlib.redirect_stdout(io.StringIO()) as chatter:
        policy = open_policy(source)
    logger.debug("%s said: %s", source, chatter.getvalue())
    report = describe_policy(policy, lam, layer, blocks=blocks, token=token, projector=projector, train_lam=train_lam)
    write(to_json(report.to_dict()) if json else str(report))
    return 0 if report.ok else FAILED


def to_json(content: dict[str, Any]) -> str:
    """A result as JSON text; NaN has no place in it."""
    return json.dumps(content, indent=2, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
