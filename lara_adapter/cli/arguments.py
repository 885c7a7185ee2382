"""Command-line arguments taken from the library: names, types, defaults and help are those of its functions."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import docstring_parser
import tyro

from ..errors import LaraArgumentError

__all__ = ["flags_of", "replace_old_flags", "split_pairs", "takes"]

_Command = TypeVar("_Command", bound=Callable[..., int])
_HELP = {  # of arguments that several commands have
    "json": "print JSON instead of text.",
    "token_file": "file with the server's token; None: LARA_API_TOKEN of the environment, if set.",
}
_TYPES = (type(None), bool, int, float, Path, str)  # what can be typed, in the order in which it is tried


def takes(
    *functions: Callable[..., Any], positional: Sequence[str] = (), omit: Sequence[str] = ()
) -> Callable[[_Command], _Command]:
    """Make the `**arguments` of a command the parameters of library functions.

    A parameter that the command itself declares has the library's default and help unless it states others.

    Args:
        functions: functions, `__init__` methods or dataclasses with documented parameters.
        positional: parameters without a flag; all others have one.
        omit: parameters of the functions that the command does not offer, or declares itself.
    """

    def decorate(command: _Command) -> _Command:
        own = {name: p for name, p in inspect.signature(command).parameters.items() if p.kind is not p.VAR_KEYWORD}
        parameters: dict[str, inspect.Parameter] = {}
        hints: dict[str, Any] = {}
        helps = dict(_HELP)
        sources: tuple[Callable[..., Any], ...] = (*functions, command)
        for source in sources:
            for name, parameter in own.items() if source is command else inspect.signature(source).parameters.items():
                if parameter.default is parameter.empty and name in parameters:
                    parameter = parameter.replace(default=parameters[name].default)
                if source is command or name not in ("self", *omit):
                    parameters[name] = parameter
            hints |= _type_hints(source)
            documented = docstring_parser.parse(source.__doc__ or "").params
            helps |= {argument.arg_name: _plain(argument.description or "") for argument in documented}
        if missing := sorted({*positional, *parameters} - (parameters.keys() & helps.keys())):
            raise TypeError(f"{command.__name__}: {missing} are not documented parameters")

        flags = []
        names = dict.fromkeys([*positional, *(name for name in parameters if name not in own), *own])
        for name in names:
            hint, alone = _typed(hints[name]), name in positional
            shown = name.upper() + (" ..." if typing.get_origin(hint) is tuple else "")
            argument = tyro.conf.arg(help=helps[name], metavar=shown if alone else None)
            kind = inspect.Parameter.POSITIONAL_ONLY if alone else inspect.Parameter.KEYWORD_ONLY
            flags.append(parameters[name].replace(kind=kind, annotation=Annotated[hint, argument]))
        signature = inspect.Signature(flags)

        def run(*args: Any, **kwargs: Any) -> int:
            return command(**signature.bind(*args, **kwargs).arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {flag.name: flag.annotation for flag in flags}
        run.__signature__ = signature  # type: ignore[attr-defined]
        return typing.cast(_Command, run)

    return decorate


def _type_hints(source: Any) -> dict[str, Any]:
    """As typing's, of a dataclass's fields alone: Python 3.10's refuses an InitVar (bpo-44799)."""
    if dataclasses.is_dataclass(source):
        annotations = {field.name: field.type for field in dataclasses.fields(source)}
        source = type("Fields", (), {"__annotations__": annotations, "__module__": source.__module__})
    return typing.get_type_hints(source)


def _plain(text: str) -> str:
    """A docstring without line breaks and markup."""
    return re.sub(r":\w+:(?=`)|`", "", " ".join(text.split()))


def _typed(hint: Any) -> Any:
    """What of a type can be typed: `str | os.PathLike[str] | nn.Module` is `str`, a sequence a tuple."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence) and origin is not tuple:
        return tuple[_typed(members[0]), ...]  # type: ignore[misc]
    if origin not in (typing.Union, types.UnionType):
        return hint
    kept = [member for member in members if member in _TYPES or typing.get_origin(member) is Literal]
    if str in kept:
        kept = [member for member in kept if member is not Path]
    kept.sort(key=lambda member: _TYPES.index(member) if member in _TYPES else 0)
    return typing.Union[tuple(kept)]  # noqa: UP007  (of a tuple)


def flags_of(command: Callable[..., int]) -> list[str]:
    """The arguments of a command that have a flag."""
    return [p.name for p in inspect.signature(command).parameters.values() if p.kind is p.KEYWORD_ONLY]


def replace_old_flags(
    arguments: Sequence[str], renamed: Mapping[str, tuple[str, str]], warn: Callable[[str], object]
) -> list[str]:
    """Replace flags of the last release, with a warning for each; `renamed`: old flag -> (flag, suffix of its value)."""
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        old, equals, value = argument.partition("=")
        flag, suffix = renamed.get(old.replace("_", "-"), (None, ""))
        if flag is None:
            result.append(argument)
            continue
        warn(f"{old} is now {flag}; the old name will be removed in the next release")
        if equals:
            result.append(f"{flag}={value}{suffix}")
        else:
            result += [flag, next(rest, "") + suffix] if suffix else [flag]
    return result


def split_pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Parse NAME=VALUE arguments.

    Raises:
        LaraArgumentError: one has another form.
    """
    pairs = [text.partition("=") for text in texts]
    wrong = ["".join(pair) for pair in pairs if not all(pair)]
    if wrong:
        raise LaraArgumentError(f"{name}: {wrong} does not have the form NAME=VALUE")
    return {key: value for key, _, value in pairs}
