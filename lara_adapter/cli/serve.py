"""`lara serve`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from ..errors import LaraArgumentError
from ..serving.protocol import MAX_MESSAGE_BYTES
from ..serving.server import PolicyServer

__all__ = ["TOKEN_VARIABLE", "read_token", "serve"]

TOKEN_VARIABLE = "LARA_API_TOKEN"


def serve(
    source: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 5555,
    device: str | None = None,
    embodiment_tag: str | None = None,
    token_file: Path | None = None,
    allow_kill: bool = False,
    max_message_mb: int = MAX_MESSAGE_BYTES // 2**20,
) -> int:
    """Serve a policy over ZMQ until it is interrupted. Clients: `lara eval`, PolicyClient, GR00T N1.6's own client.

    Prints the address when it is ready. Exit status: 0 when it was stopped; 2 if the policy cannot be opened.

    Args:
        source: folder or Hub id of a LeRobot policy or a GR00T N1.6 checkpoint, or a function that returns an object with
            get_action(observation): package.module:function or path/to/file.py:function.
        host: address to listen on; 0.0.0.0 is every network of this machine.
        port: TCP port; 0 is any free one.
        device: of a checkpoint: cpu, cuda, cuda:1; without it a GPU where there is one.
        embodiment_tag: of a GR00T checkpoint that knows several.
        token_file: file with the token that clients must send; without it LARA_API_TOKEN of the environment, if set.
        allow_kill: let clients stop the server.
        max_message_mb: larger messages are refused.
    """
    from ..integrations.served import open_served
    from .output import write

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    token = read_token(token_file)
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(sys.stderr):  # hosts talk while they load; stdout has the address alone
        policy = open_served(source, device=device, embodiment_tag=embodiment_tag)
    server = PolicyServer(
        policy, host, port, api_token=token, allow_kill=allow_kill, max_message_bytes=max_message_mb * 2**20,
        description=source,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    write(f"serving {source} on tcp://{server.host}:{server.port}")
    server.run()
    return 0


def read_token(file: Path | None) -> str | None:
    """The token in a file, else that of the environment, else None. Never an argument, which every user could read.

    Raises:
        LaraArgumentError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LaraArgumentError(f"token_file: {file} cannot be read: {error}") from error
    if not token:
        raise LaraArgumentError(f"token_file: {file} is empty")
    return token
