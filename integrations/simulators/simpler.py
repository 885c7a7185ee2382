"""SimplerEnv (github.com/simpler-env/SimplerEnv): evaluation of Bridge and Fractal policies in simulation.

Tested only against a mock of SimplerEnv's interface.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.errors import HostNotInstalled
from lara_adapter.evaluation import Observation

__all__ = ["Simpler", "SimplerEnvironment"]

INSTALL = "clone github.com/simpler-env/SimplerEnv with its submodules and install it as its README says"
_WIDOWX = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")
_GOOGLE = ("x", "y", "z", "rx", "ry", "rz", "rw", "gripper")
# Bridge measures the WidowX hand's rotation from pointing down
_BRIDGE = np.array([[0, 0, 1.0], [0, 1.0, 0], [-1.0, 0, 0]])
_STICKY = 15  # steps for which the Google robot's gripper continues a motion


class Simpler:
    """SimplerEnv's tasks.

    A policy is offered the view "image", also named "image_0" for the WidowX; the states of its robot under GR00T's names
    (WidowX: x, y, z, roll, pitch, yaw, pad, gripper; Google robot: x, y, z, rx, ry, rz, rw, gripper), and all of them as
    "state" [8]. Its action is [7]: hand movement, rotation as axis-angle, gripper (0 closes, 1 opens).
    """

    name = "simpler"

    def __init__(self) -> None:
        """Raise HostNotInstalled if SimplerEnv is missing."""
        if importlib.util.find_spec("simpler_env") is None:
            raise HostNotInstalled(f"SimplerEnv is not installed: {INSTALL}")
        self.settings: dict[str, Any] = {}

    def tasks(self) -> list[str]:
        """Names of all tasks: widowx_*, google_robot_*."""
        import simpler_env

        return list(simpler_env.ENVIRONMENTS)

    def open(self, task: str) -> SimplerEnvironment:
        """Build the environment of a task."""
        return SimplerEnvironment(task)


class SimplerEnvironment:
    """One task of SimplerEnv."""

    action_width, fps = 7, 5.0

    def __init__(self, task: str) -> None:
        import simpler_env

        self._env, self._widowx = simpler_env.make(task), task.startswith("widowx")
        self.max_steps = 120 if self._widowx else 300
        self._raw: Any = None
        self._held, self._left = 0.0, 0

    def reset(self, seed: int) -> None:
        """Begin; the seed decides where the objects are."""
        self._raw, _ = self._env.reset(seed=seed)
        self._held, self._left = 0.0, 0

    def observe(self, views: Sequence[str] | None = None) -> Observation:
        """Observe."""
        hand = np.asarray(self._raw["agent"]["eef_pos"], np.float64)  # x, y, z, quaternion (w, x, y, z), gripper
        if self._widowx:
            names, values = _WIDOWX, [*hand[:3], *euler(rotation(hand[3:7]) @ _BRIDGE.T), 0.0, hand[7]]
        else:
            names, values = _GOOGLE, [*hand[:3], *np.roll(hand[3:7], -1), 1 - hand[7]]
        states = {name: np.array([value], np.float32) for name, value in zip(names, values, strict=True)}
        image = self.picture()
        return Observation(
            views={"image": image, "image_0": image},
            states={**states, "state": np.array(values, np.float32)},
            instruction=self._env.unwrapped.get_language_instruction(),
        )

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action [7]."""
        action = np.array(action, np.float32)
        action[-1] = (1.0 if action[-1] > 0.5 else -1.0) if self._widowx else self._sticky(1 - 2 * float(action[-1]))
        self._raw, _, done, _, _ = self._env.step(action)
        return bool(done)

    def _sticky(self, closing: float) -> float:
        """The Google robot's gripper moves relatively: a clear opening or closing is held for some steps."""
        if self._left == 0 and abs(closing) > 0.5:
            self._held, self._left = closing, _STICKY
        if self._left == 0:
            return closing
        self._left -= 1
        return self._held

    def picture(self) -> NDArray[np.uint8]:
        """The camera's image."""
        from simpler_env.utils.env.observation_utils import get_image_from_maniskill2_obs_dict

        image: NDArray[np.uint8] = get_image_from_maniskill2_obs_dict(self._env, self._raw)
        return image

    def close(self) -> None:
        """Close the simulator."""
        self._env.close()


def rotation(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix [3, 3] of a quaternion (w, x, y, z)."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def euler(matrix: NDArray[np.float64]) -> tuple[float, float, float]:
    """Roll, pitch and yaw about fixed axes x, y, z, in radians."""
    cosine = math.hypot(matrix[0, 0], matrix[1, 0])
    pitch = math.atan2(-matrix[2, 0], cosine)
    if cosine < 1e-8:
        return math.atan2(-matrix[1, 2], matrix[1, 1]), pitch, 0.0
    return math.atan2(matrix[2, 1], matrix[2, 2]), pitch, math.atan2(matrix[1, 0], matrix[0, 0])
