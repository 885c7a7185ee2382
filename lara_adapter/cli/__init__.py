"""The command line `lara`: one module per command; the arguments come from the library (:mod:`.arguments`).

A command returns its exit status and writes its result through :mod:`.output`; everything else is logged, on stderr. A
:class:`LaraError` is one line on stderr and status 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import LaraError, name_flags
from .output import write

__all__ = ["COMMANDS", "Command", "load_command", "main"]

REFUSED = 2  # exit status: the question could not be answered; 1: the answer is no


class Command(NamedTuple):
    """A command.

    function: its name, and that of its module.
    help: one line.
    examples: command lines, the simplest first, without `lara`.
    common: the flags that most people need, beside those that must be given.
    renamed: flags of the last release, which still work: the present flag, and what is appended to the value.
    """

    function: str
    help: str
    examples: tuple[str, ...]
    common: tuple[str, ...]
    renamed: dict[str, tuple[str, str]] = {}  # noqa: RUF012


COMMANDS = {
    "convert": Command(
        "convert", "a latent action model of LARA's authors or Moto's to our format, and back",
        ("convert MengyaLiu/LARA_full my-lam --subfolder latent_motion_tokenizer", "convert my-lam back"),
        ("frames", "to", "adapter", "allow_pickle", "image_encoder"),
    ),
    "inspect": Command(
        "inspect", "what LARA would do with a policy: blocks, tap, tokens, size",
        ("inspect nvidia/GR00T-N1.6-3B", "inspect path/to/file.py:make_policy --batch path/to/file.py:make_batch"),
        ("lam", "layer", "blocks", "token", "entry", "batch"),
    ),
    "label": Command(
        "label", "write the latent action of every frame of a LeRobot-format dataset",
        ("label my-dataset --lam my-lam --gap 16 --output my-dataset-labelled",
         "label videos --lam my-lam --gap 16 --output labels.parquet --sidecar"),
        ("actions", "camera", "batch_size", "device", "shard", "merge", "sidecar"),
    ),
    "cache": Command(
        "cache", "encode the frames of a dataset before training needs their features",
        ("cache my-dataset --lam my-lam --output features",
         "cache my-dataset --lam my-lam --output features --cameras front --dtype float32"),
        ("cameras", "dtype", "batch_size", "device"),
    ),
    "health": Command(
        "health", "is this latent action model any good on this data?",
        ("health my-lam my-dataset --gap 16", "health my-lam videos --html health.html"),
        ("gap", "camera", "pairs", "episodes", "html", "json"),
    ),
    "attention": Command(
        "attention", "what a latent action model looks at, as pictures",
        ("attention my-lam my-dataset --gap 16 --output attention",
         "attention my-lam my-dataset --gap 16 --compare my-lara-lam --output attention"),
        ("gap", "compare", "frames", "camera", "queries"),
    ),
    "train-lam": Command(
        "train_lam", "pre-train a latent action model on folders of unlabelled video",
        ("train-lam videos --output runs/lam --preset tiny", "train-lam videos my-dataset --output runs/lam --bf16"),
        ("preset", "config", "init", "gap", "cameras", "actions", "augment", "steps", "batch_size", "lr", "bf16"),
        {"--gap-frames": ("--gap", ""), "--gap-seconds": ("--gap", "s")},
    ),
    "serve": Command(
        "serve", "serve a policy over ZMQ, in GR00T's wire protocol",
        ("serve outputs/lerobot_posttrain/policy", "serve examples/served_policies.py:expert --port 5556"),
        ("host", "port", "device", "token_file", "embodiment_tag"),
    ),
    "eval": Command(
        "evaluate", "let a served policy act in a simulator, and count",
        ("eval drawer-open door-open --output outputs/eval --episodes 20 --videos 2",
         "eval all --simulator libero --setting suite=libero_10 --output outputs/libero_10"),
        ("simulator", "episodes", "seed", "execute", "videos", "workers", "host", "port", "rename", "setting"),
    ),
}  # fmt: skip


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
        return _refuse(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
    try:
        import tyro
    except ImportError:
        return _refuse("the command line needs tyro: pip install 'lara-adapter[cli]'")
    from .arguments import flags_of, replace_old_flags
    from .usage import short_help

    try:
        if not {"-h", "--help"}.isdisjoint(arguments[1:]):
            write(short_help(name, load_command(name), command.examples, command.common))
            return 0
        given = replace_old_flags(arguments[1:], command.renamed, lambda message: _report(f"{name}: {message}"))
        given = ["--help" if each == "--help-all" else each for each in given]
        # tyro itself ends the process for its help (0) and for arguments that do not parse (2)
        return int(tyro.cli(load_command(name), prog=f"lara {name}", args=given))
    except LaraError as error:
        message = name_flags(str(error).removeprefix(f"{name}: "), flags_of(load_command(name)))
        return _refuse(f"{name}: {message}")


def load_command(name: str) -> Callable[..., int]:
    """Import the function of a command."""
    function = COMMANDS[name].function
    command: Callable[..., int] = getattr(importlib.import_module(f".{function}", __name__), function)
    return command


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "lara inspect examples/mini_vla.py:MiniVLA\nlara train-lam videos --output my-lam\n\n"
        f"Commands of lara-adapter:\n\n{listed}\n\nlara COMMAND --help: an example and its flags; lara --version"
    )


def _report(message: str) -> None:
    sys.stderr.write("lara: " + " ".join(message.split()) + "\n")


def _refuse(message: str) -> int:
    _report(message)
    return REFUSED
