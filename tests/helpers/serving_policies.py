"""Policies to serve, and a process that serves one: `python serving_policies.py Echo PORT` prints its port."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lara_adapter.serving import PolicyServer

ROOT = Path(__file__).resolve().parents[2]


class Echo:
    """The action depends on the observation, so that an answer to another request is detected."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.resets: list[Any] = []

    def get_action(self, observation, options=None):
        state = observation["state"]["position"]
        self.calls.append(float(state.flat[0]))
        time.sleep(observation.get("sleep", 0))
        return {"velocity": state * 2}, {"options": options}

    def reset(self, options=None):
        self.resets.append(options)
        return {"reset": options}


class Bare:
    """Nothing but get_action, which returns an array and expects a certain shape."""

    def get_action(self, observation):
        if observation["state"].shape != (1, 4):
            raise ValueError(f"state: got {list(observation['state'].shape)}, but [1, 4] is expected")
        if observation.get("poison"):
            return np.array([[1.0, np.nan]])
        return observation["state"][:, :2]


def observation(value: float = 1.0, **more: Any) -> dict[str, Any]:
    """Two views of 32 x 32 and a state."""
    return {
        "video": {view: np.zeros((1, 1, 32, 32, 3), np.uint8) for view in ("front", "wrist")},
        "state": {"position": np.full((1, 1, 2), value, np.float32)},
        **more,
    }


@contextlib.contextmanager
def serving(policy: Any, **settings: Any):
    """A server in a thread of this process; yields it."""
    server = PolicyServer(policy, port=0, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive(), "the server hangs"


@contextlib.contextmanager
def process(policy: str = "Echo", port: int = 0):
    """A server in a process of its own; yields (Popen, port)."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    child = subprocess.Popen(
        [sys.executable, __file__, policy, str(port)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield child, int(child.stdout.readline())
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


if __name__ == "__main__":
    with PolicyServer(globals()[sys.argv[1]](), port=int(sys.argv[2]), allow_kill=True) as served:
        sys.stdout.write(f"{served.port}\n")
        sys.stdout.flush()
        served.run()
