"""What a test plans to go wrong, and what it looks at afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Attributes:
        method: of the requests.
        path: regular expression, searched in the path.
        times: so many of them fail, and then none.
        skip: so many of them are first served well.
        status: answered instead of serving; None: the connection breaks instead.
        headers: of that answer.
        after: bytes of the body that come (GET) or are read (PUT) before the connection breaks.
        reset: the connection is reset and not only closed.
        alter: the body is served whole, with its first byte changed.
        lose: it is served, and the connection breaks before the answer.
        call: nothing goes wrong; this is called first.
    """

    method: str
    path: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    reset: bool = False
    alter: bool = False
    lose: bool = False
    call: Callable[[], object] | None = None


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    user: str | None
    token: str | None
    headers: dict[str, str]
    status: int = 0
    received: int = 0
