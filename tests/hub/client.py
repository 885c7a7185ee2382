"""A process that uses the Hub as a user's program does, on the local server; it imports once and runs steps on request.

HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported, so that a test's own process, which
must never ask the real Hub, cannot be the client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class StepFailed(Exception):
    """A step raised; `kinds` are the names of its error's classes, the most special first."""

    def __init__(self, kinds: list[str], message: str, trace: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message, self.trace = kinds, message, trace


class Client:
    """One process; use it as a context.

    Args:
        url: of the server.
        home: HF_HOME, with the cache; shared by processes that are to share it.
        offline: HF_HUB_OFFLINE.
        token: HF_TOKEN.
    """

    def __init__(self, url: str, home: Path, *, offline: bool = False, token: str | None = "hf_alice") -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # another protocol, which this server does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]),
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
            **({"HF_TOKEN": token} if token else {}),
        }
        command = [sys.executable, "-m", "hub.steps"]
        self._said = (home / f"stderr-{id(self)}.txt").open("w+")
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)
        self._said.close()

    def __call__(self, step: str, /, **arguments: Any) -> Any:
        """Run a function of steps.py in the process.

        Raises:
            StepFailed: it raised.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([step, arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise AssertionError(f"the process ended in step {step}: {self._said.read()[-2000:]}")
        answer = json.loads(line)
        if "kinds" in answer:
            raise StepFailed(answer["kinds"], answer["message"], answer["trace"])
        return answer["result"]

    def refused(self, step: str, /, **arguments: Any) -> StepFailed:
        """Run a step that must raise, and return what it raised."""
        try:
            result = self(step, **arguments)
        except StepFailed as failed:
            return failed
        raise AssertionError(f"{step} went well and gave {result}")
