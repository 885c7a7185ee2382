"""`lara inspect`."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Literal

from .output import to_json, write

__all__ = ["inspect_policy"]

logger = logging.getLogger(__name__)


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
    from ..inspection import describe_policy
    from ..integrations.loading import open_policy

    # what hosts print while they build a policy would stand before the result
    with contextlib.redirect_stdout(io.StringIO()) as chatter:
        policy = open_policy(source)
    logger.debug("%s said: %s", source, chatter.getvalue())
    report = describe_policy(policy, lam, layer, blocks=blocks, token=token, projector=projector, train_lam=train_lam)
    write(to_json(report.to_dict()) if json else str(report))
    return 0 if report.ok else 1
