"""The steps of the loop that are commands of their own: `lara ...`, and a training script in another environment."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_READY = " on tcp://"  # what `lara serve` prints before its address


class CommandFailed(RuntimeError):
    """A command ended with an error, which it has printed."""


@dataclasses.dataclass(frozen=True)
class Server:
    """How a policy is served: Python of its environment, source of `lara serve`, and variables."""

    python: Path
    source: str
    variables: Mapping[str, str]


def run(python: Path, *arguments: str) -> None:
    """Run a Python program in this terminal.

    Raises:
        CommandFailed: it failed, or that Python does not exist.
    """
    try:
        status = subprocess.run([str(python), *arguments], check=False, env=_environment({})).returncode
    except FileNotFoundError as problem:
        raise CommandFailed(f"{python} was not found; make lerobot-env installs LeRobot's environment") from problem
    if status:
        raise CommandFailed(f"exit status {status}: {python} {' '.join(arguments)}")


def lara(*arguments: str) -> None:
    """Run `lara ...`; see :func:`run`."""
    run(Path(sys.executable), "-m", "lara_adapter.cli", *arguments)


@contextlib.contextmanager
def served(server: Server) -> Iterator[str]:
    """A server on a free port while the context lasts: its address.

    Raises:
        CommandFailed: it did not start.
    """
    command = [str(server.python), "-m", "lara_adapter.cli", "serve", server.source, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment(server.variables))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if _READY not in line:
            raise CommandFailed(f"the server did not start: {' '.join(command)}")
        yield line.strip().rpartition("tcp://")[2]
    finally:
        process.terminate()
        process.wait()


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    # as `python -m` does: the modules of this folder are found by every command. transformers lists each unused weight
    quiet = {"TRANSFORMERS_VERBOSITY": "error"}
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    return {**quiet, **os.environ, "PYTHONPATH": path, **variables}
