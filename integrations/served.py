"""Open the policy of `lara serve` as an object that a :class:`lara_adapter.serving.PolicyServer` can serve.

No part of LARA is loaded: a post-trained policy acts without it.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from .loading import call_named, identify

__all__ = ["open_served"]


def open_served(source: str | os.PathLike[str], *, device: str = "cpu", embodiment_tag: str | None = None) -> Any:
    """Load a policy to be served.

    Args:
        source: one of
            - the folder or Hub id of a LeRobot policy or GR00T N1.6 checkpoint, with its processors;
            - "package.module:callable" or "path/to/file.py:callable", called without arguments, which returns anything
              with `get_action(observation)`. A torch module gets tensors on its own device, in eval mode and without
              gradients; anything else gets what came over the wire.
        device: for checkpoints: "cpu", "cuda", "cuda:1".
        embodiment_tag: which embodiment of a GR00T checkpoint acts; may be None if it has only one.

    Returns:
        The policy. A checkpoint takes and gives GR00T's layout (see :mod:`.observations`), and with
        `options={"seed": int}` the sampling noise of a call depends on the seed alone.

    Raises:
        PolicySourceError: it cannot be opened.
        HostNotInstalled: the checkpoint's library cannot be imported.
    """
    text = os.fspath(source)
    identified = identify(text)
    if identified.host == "lerobot":
        from .lerobot.serve import LeRobotPolicy

        return LeRobotPolicy.load(text, device)
    if identified.host == "gr00t":
        from .gr00t.serve import Gr00tPolicy

        return Gr00tPolicy.load(text, device, embodiment_tag)
    policy = call_named(text)
    if isinstance(policy, nn.Module):
        from .module_policy import ModulePolicy

        return ModulePolicy(policy)
    return policy
