"""Flags and keyword arguments of the previous release, accepted in this one with a warning."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lara_adapter import LaraArgumentError

__all__ = ["accept_old_names", "current_flags"]

logger = logging.getLogger(__name__)

_CURRENT = {"camera": "views", "cameras": "views", "horizon": "gap", "size": "frame_size"}
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])


def accept_old_names(*names: str) -> Callable[[_Decorated], _Decorated]:
    """Decorate a function or dataclass that took these keyword arguments in the previous release."""

    def decorate(decorated: _Decorated) -> _Decorated:
        function: Any = decorated.__init__ if isinstance(decorated, type) else decorated  # type: ignore[misc]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in kwargs.keys() & set(names):
                new = _CURRENT[old]
                _warn(old, new)
                if new in kwargs:
                    raise LaraArgumentError(f"{old} is the old name of {new}, and both are given")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        if not isinstance(decorated, type):
            return call  # type: ignore[return-value]
        decorated.__init__ = call  # type: ignore[misc]
        return decorated

    return decorate


def current_flags(arguments: Sequence[str]) -> list[str]:
    """Replace the old names of `--lara.*` flags in a command line by the current ones."""
    replaced = []
    for argument in arguments:
        if (match := re.fullmatch(r"--lara\.(\w+)(=.*)?", argument, re.DOTALL)) and match[1] in _CURRENT:
            old, new = f"--lara.{match[1]}", f"--lara.{_CURRENT[match[1]]}"
            _warn(old, new)
            argument = new + (match[2] or "")
        replaced.append(argument)
    return replaced


@functools.cache  # once per name and process
def _warn(old: str, new: str) -> None:
    logger.warning("%s is now %s; the old name will be removed in the next release", old, new)
