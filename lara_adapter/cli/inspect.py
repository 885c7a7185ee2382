"""`lara inspect`."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from ..inspection import describe_policy
from ..integrations.loading import call_named, open_policy
from .arguments import takes
from .output import write_result

__all__ = ["inspect"]

logger = logging.getLogger(__name__)


@takes(describe_policy, positional=("source",), omit=("policy", "batch"))
def inspect(source: str, *, json: bool = False, batch: str | None = None, **arguments: Any) -> int:
    """What LARA would do with a policy: blocks, tap, action tokens, frames, parameters added. Nothing is attached.

    Exit status: 0; 1 if LARA cannot attach or aligns the wrong state; 2 if the policy or the LAM cannot be opened.

    Args:
        source: folder or Hub id of a checkpoint (only its config.json is read), or a function that returns a policy:
            package.module:function or path/to/file.py:function.
        batch: a function that returns a training batch, named likewise: token and rows are then proven by moving its
            actions. The source must be a function too, since a checkpoint's weights are not read.
    """
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # hosts print while they build a policy
        policy = open_policy(source)
        given = None if batch is None else call_named(batch)
    logger.debug("%s printed: %s", source, printed.getvalue())
    report = describe_policy(policy, batch=given, **arguments)
    write_result(report.to_dict(), str(report), json)
    return 0 if report.ok else 1
