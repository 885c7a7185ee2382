"""The `--lara.*` flags of the training command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lara_adapter.errors import LaraArgumentError
from lara_adapter.schedules import weight_from_json

__all__ = ["LaraOptions", "parse_options"]

_DATA = ("camera", "horizon", "size", "feature_cache")
_SOURCE = ("lam", "path", "revision")
# they decide which parameters there are, and so the optimizer's state, which LeRobot stores by position
_FIXED = ("layer", "blocks", "projector", "train_lam")


@dataclass(frozen=True)
class LaraOptions:
    """What the command line says of LARA; only flags that were given.

    Attributes:
        values: flag without `--lara.` to parsed value.
    """

    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a flag."""
        return self.values.get(name, default)

    @property
    def attach_arguments(self) -> dict[str, Any]:
        """Those that are arguments of `attach_lara`, without `lam`."""
        return {name: value for name, value in self.values.items() if name not in (*_DATA, *_SOURCE)}

    def check_new_run(self) -> None:
        """A run that starts needs one source of the LAM.

        Raises:
            LaraArgumentError: none, or both.
        """
        if ("lam" in self.values) == ("path" in self.values):
            raise LaraArgumentError(
                "give either --lara.lam=FOLDER (a latent action model) or --lara.path=FOLDER (a saved adapter: projector, "
                "LAM and settings); without LARA use lerobot-train"
            )

    def check_resume(self) -> None:
        """A resumed run goes on with what it has; weights, alignment and data may change.

        Raises:
            LaraArgumentError: a flag that would change the parameters.
        """
        wrong = [f"--lara.{name}" for name in (*_SOURCE, *_FIXED) if name in self.values]
        if wrong:
            raise LaraArgumentError(
                f"{', '.join(wrong)}: fixed by the checkpoint that is resumed. For a new run from its weights use "
                "--policy.path=CHECKPOINT/pretrained_model --lara.path=CHECKPOINT/pretrained_model/lara"
            )


def parse_options(argv: Sequence[str]) -> tuple[LaraOptions, list[str]]:
    """Split a command line.

    Args:
        argv: without the program's name.

    Returns:
        LARA's options, and everything else in its order, for LeRobot.

    Raises:
        SystemExit: an unknown `--lara.*` flag or a value that cannot be read; usage and reason go to stderr.
    """
    ours: list[str] = []
    theirs: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--lara."):
            theirs.append(token)
            continue
        ours.append(token)
        if "=" not in token and rest and not rest[0].startswith("--"):  # LeRobot's own rule for `--flag value`
            ours.append(rest.pop(0))
    return LaraOptions(vars(make_parser().parse_args(ours))), theirs


def make_parser() -> argparse.ArgumentParser:
    """The parser of the `--lara.*` flags; a flag that is not given leaves no attribute."""
    parser = argparse.ArgumentParser(
        prog="python -m lara_adapter.integrations.lerobot.train",
        usage="%(prog)s --lara.lam=FOLDER [--lara.*] <the flags of lerobot-train>",
        argument_default=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("LARA")

    def flag(name: str, text: str, kind: Callable[[str], Any] = str) -> None:
        group.add_argument(f"--lara.{name}", dest=name, type=kind, help=text, metavar="VALUE")

    flag("lam", "folder or Hub id of a latent action model")
    flag("path", "folder or Hub id of a saved adapter to go on from, in place of lam")
    flag("revision", "branch, tag or commit of a --lara.path on the Hub")
    flag(
        "camera",
        "key of a camera or its last part, several with commas, or all; needed if there are several",
        _list,
    )
    flag("horizon", "frames between the two frames; the length of the policy's action chunk if not given", int)
    flag("size", "resize the frames in the workers: 224, or 240x320 (height x width)", _size)
    flag(
        "layer", "which hidden state: -1 the last block, -3 the paper's L-2 (default), k after block k", _number_or_text
    )
    flag("blocks", "dotted path of the DiT's blocks, for policies that are not in the table")
    flag("token", "last_valid (default), mean_valid, last, or a step of the chunk", _number_or_text)
    flag("projector", "mlp (default) or linear")
    flag("alignment", "cosine (default) or contrastive")
    flag("align_weight", 'w1: a number (default 0.01), or a schedule as JSON: {"schedule": ...}', _weight)
    flag("lam_weight", "w2, likewise", _weight)
    flag("lam_grad_scale", "factor on the alignment gradient that reaches the LAM (default 1)", float)
    flag("train_lam", "false: frozen LAM", _bool)
    flag("feature_cache", "folder for the features of the LAM's frozen image encoder: no frame is encoded twice")
    return parser


def _list(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names


def _size(text: str) -> int | tuple[int, int]:
    try:
        numbers = [int(part) for part in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r}, but pixels (224) or height x width (240x320) is expected")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _number_or_text(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _weight(text: str) -> Any:
    try:
        return weight_from_json(json.loads(text)) if text.lstrip().startswith("{") else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, but true or false is expected")
    return text.lower() == "true"
