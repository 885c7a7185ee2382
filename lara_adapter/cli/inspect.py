"""`lara inspect`."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from ..inspection import describe_policy
from ..integrations.loading import open_policy
from .arguments import takes
from .output import write_result

__all__ = ["inspect"]

logger = logging.getLogger(__name__)


@takes(describe_policy, positional=("source",), omit=("policy",))
def inspect(source: str, *, json: bool = False, **arguments: Any) -> int:
    """What LARA would do with a policy: blocks, tap, action tokens, frames, parameters added. Nothing is attached.

    Exit status: 0; 1 if LARA cannot attach; 2 if the policy or the LAM cannot be opened.

    Args:
        source: folder or Hub id of a checkpoint (only its config.json is read), or a function that returns a policy:
            package.module:function or path/to/file.py:function.
    """
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # hosts print while they build a policy
        policy = open_policy(source)
    logger.debug("%s printed: %s", source, printed.getvalue())
    report = describe_policy(policy, **arguments)
    write_result(report.to_dict(), str(report), json)
    return 0 if report.ok else 1
