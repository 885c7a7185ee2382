"""What a policy says of itself, where its forward runs several times to prove something."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

__all__ = ["each_message_once"]


@contextlib.contextmanager
def each_message_once() -> Iterator[None]:
    """Show each log message and each warning of the policy once, however often its forward runs.

    The messages of this library are not touched. Handlers that are added inside are not filtered.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {id(found): found for one in loggers for found in getattr(one, "handlers", ())}
    if logging.lastResort is not None:
        handlers[id(logging.lastResort)] = logging.lastResort
    filters = {key: _Once() for key in handlers}
    shown: set[tuple[Any, ...]] = set()
    show = warnings.showwarning

    def show_once(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if (key := (str(message), category, filename, lineno)) not in shown:
            shown.add(key)
            show(message, category, filename, lineno, file, line)

    for key, handler in handlers.items():
        handler.addFilter(filters[key])
    warnings.showwarning = show_once
    try:
        yield
    finally:
        if warnings.showwarning is show_once:
            warnings.showwarning = show
        for key, handler in handlers.items():
            handler.removeFilter(filters[key])


class _Once(logging.Filter):
    """Of one handler: lets a message of another library pass the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[tuple[str, int, str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] == __name__.partition(".")[0]:
            return True
        key = (record.name, record.levelno, str(record.msg), str(record.args))
        known = key in self._passed
        self._passed.add(key)
        return not known
