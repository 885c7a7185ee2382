"""`lara serve`."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from ..integrations.served import open_served
from ..serving.address import parse_address
from ..serving.protocol import MAX_MESSAGE_BYTES, require_zmq
from ..serving.server import PolicyServer
from .arguments import takes
from .credentials import read_token
from .output import write

__all__ = ["serve"]

logger = logging.getLogger(__name__)


@takes(
    PolicyServer.__init__, open_served,
    positional=("source",), omit=("policy", "api_token", "description", "max_message_bytes"),
)  # fmt: skip
def serve(
    source: str,
    *,
    host: str,
    port: int | None,
    device: str | None = None,
    embodiment_tag: str | None,
    token_file: Path | None = None,
    max_message_mb: int = MAX_MESSAGE_BYTES // 2**20,
    **arguments: Any,
) -> int:
    """Serve a policy over ZMQ until it is interrupted. Clients: `lara eval`, PolicyClient, GR00T N1.6's own client.

    Prints the address when it is ready. Exit status: 0 when it was stopped; 2 if the policy cannot be opened.

    Args:
        source: folder or Hub id of a LeRobot policy or a GR00T N1.6 checkpoint, or a function that returns an object with
            get_action(observation): package.module:function or path/to/file.py:function.
        device: of a checkpoint: cpu, cuda, cuda:1; None: a GPU if there is one.
        max_message_mb: larger messages are refused.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    token = read_token(token_file)
    require_zmq()  # refused before the policy is loaded
    parse_address(host, port, listen=True)
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(sys.stderr):  # hosts print while they load; stdout is for the address
        policy = open_served(source, device=device, embodiment_tag=embodiment_tag)
    if not callable(getattr(policy, "get_modality_config", None)):
        logger.warning("the policy has no get_modality_config(): `lara eval` cannot know its views, states and actions")
    server = PolicyServer(
        policy, host, port, api_token=token, max_message_bytes=max_message_mb * 2**20, description=source, **arguments
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    write(f"serving {source} on {server.address}")  # on stdout, for scripts; the log says it for people
    server.run()
    return 0
