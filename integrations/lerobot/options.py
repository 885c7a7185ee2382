"""The `--lara.*` flags of the training command: the fields of a dataclass."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lara_adapter.errors import LaraArgumentError
from lara_adapter.losses import Contrastive
from lara_adapter.schedules import weight_from_json

from ..old_names import current_flags
from ..settings import ATTACH_ARGUMENTS, LaraSettings

__all__ = ["LaraOptions", "LeRobotSettings", "parse_options"]

# the last four decide which parameters there are, and so the optimizer's state, which LeRobot stores by position
_FIXED = ("lam", "path", "revision", "layer", "blocks", "projector", "train_lam")


@dataclass
class LeRobotSettings(LaraSettings):
    """LaraSettings with what LeRobot's command line offers beyond them.

    Attributes:
        path: folder or Hub id of a saved adapter to continue from, instead of lam.
        revision: branch, tag or commit of a --lara.path on the Hub.
        blocks: dotted path of the DiT's blocks, for policies that are not in the table.
        token: which action token is aligned: last_valid, mean_valid, last, or a step of the chunk.
        align_weight: w1 of L_ACT + w1 L_LARA + w2 L_LAM: a number, or a schedule as JSON: {"schedule": ...}.
        views: key of a camera or its last part, several with commas, or all; needed if there are several.
        frame_size: resize the frames in the workers: 224, or 240x320 (height x width); none: as recorded.
    """

    path: str | None = None
    revision: str | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class LaraOptions:
    """The `--lara.*` flags of a command line.

    Attributes:
        values: of the flags that were given: name without `--lara.` to parsed value.
    """

    values: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a flag."""
        return self.values.get(name, default)

    @property
    def attach_arguments(self) -> dict[str, Any]:
        """Arguments of `attach_lara` other than `lam`.

        Raises:
            LaraArgumentError: a temperature without the contrastive alignment.
        """
        arguments = {name: value for name, value in self.values.items() if name in ATTACH_ARGUMENTS}
        if "temperature" in self.values:
            if arguments.get("alignment") != "contrastive":
                raise LaraArgumentError("--lara.temperature is for --lara.alignment=contrastive; give both")
            arguments["alignment"] = Contrastive(self.values["temperature"])
        return arguments

    def check_new_run(self) -> None:
        """Raise LaraArgumentError unless one of --lara.lam and --lara.path is given, as a new run needs."""
        if ("lam" in self.values) == ("path" in self.values):
            raise LaraArgumentError(
                "give either --lara.lam=FOLDER (a latent action model) or --lara.path=FOLDER (a saved adapter: projector, "
                "LAM and settings); without LARA use lerobot-train"
            )

    def check_resume(self) -> None:
        """Raise LaraArgumentError for a flag that would change the parameters of a resumed run."""
        wrong = [f"--lara.{name}" for name in _FIXED if name in self.values]
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
    rest = current_flags(argv)
    while rest:
        part = ours if rest[0].startswith("--lara.") else theirs
        part.append(rest.pop(0))
        # LeRobot's own rule for `--flag value`
        if part is ours and "=" not in ours[-1] and rest and not rest[0].startswith("--"):
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
    helps = _documented(LaraSettings) | _documented(LeRobotSettings)
    for setting in fields(LeRobotSettings):
        if setting.name == "lam_lr":  # LeRobot's policies make their own parameter groups
            continue
        default = "" if setting.default in ("", None, ()) else f" (default: {setting.default})"
        group.add_argument(
            f"--lara.{setting.name}", dest=setting.name, type=_READERS.get(setting.name, str), metavar="VALUE",
            help=(helps[setting.name] + default).replace("%", "%%"),
        )  # fmt: skip
    return parser


def _documented(cls: type) -> dict[str, str]:
    """Field -> help, from the docstring of a settings class."""
    _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


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


# of the flags whose value is not text
_READERS: dict[str, Callable[[str], Any]] = {
    "layer": _number_or_text, "token": _number_or_text, "temperature": float, "align_weight": _weight,
    "lam_weight": _weight, "lam_grad_scale": float, "reconstruct": float, "train_lam": _bool, "views": _list,
    "gap": int, "lam_checkpointing": _bool,
    "frame_size": _size,
}  # fmt: skip
