"""LIBERO (github.com/Lifelong-Robot-Learning/LIBERO), with its usual evaluation protocol.

256-pixel views rotated by 180 degrees, the suite's stored start states, ten idle steps in which objects settle. Tested
only against a mock of LIBERO's interface.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.errors import HostNotInstalled, LaraArgumentError
from lara_adapter.evaluation import Observation

__all__ = ["Libero", "LiberoEnvironment"]

INSTALL = "git clone https://github.com/Lifelong-Robot-Learning/LIBERO and install it as its README says"
STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
_SETTLE, _IDLE = 10, np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")


class Libero:
    """The tasks of one LIBERO suite.

    A policy is offered the views "image" (agent view) and "wrist_image"; the states "x", "y", "z", "roll", "pitch", "yaw"
    (axis-angle) of the hand and "gripper" [2], and all of them as "state" [8]. Its action is [7]: hand movement, rotation,
    gripper.
    """

    name = "libero"

    def __init__(self, suite: str = "libero_spatial", image_size: int = 256, gripper: str = "rlds") -> None:
        """Open a suite.

        Args:
            suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
            image_size: side of the views in pixels.
            gripper: meaning of the action's last number. "rlds": 0 closes, 1 opens, as in the RLDS datasets that GR00T and
                OpenVLA train on; "raw": -1 opens, 1 closes, as in the simulator.

        Raises:
            HostNotInstalled: LIBERO is missing.
            LaraArgumentError: a setting has an unknown value.
        """
        if suite not in STEPS or gripper not in ("rlds", "raw"):
            raise LaraArgumentError(
                f"libero: suite={suite!r}, gripper={gripper!r}, but one of {list(STEPS)}, and rlds or raw, are expected"
            )
        if importlib.util.find_spec("libero") is None:
            raise HostNotInstalled(f"LIBERO is not installed: {INSTALL}")
        os.environ.setdefault("MUJOCO_GL", "egl")
        from libero.libero import benchmark

        self._suite = benchmark.get_benchmark_dict()[suite]()
        self.settings: dict[str, Any] = {"suite": suite, "image_size": image_size, "gripper": gripper}

    def tasks(self) -> list[str]:
        """Names of the suite's tasks."""
        return [self._suite.get_task(index).name for index in range(self._suite.get_num_tasks())]

    def open(self, task: str) -> LiberoEnvironment:
        """Build the environment of a task."""
        return LiberoEnvironment(self._suite, self.tasks().index(task), **self.settings)


class LiberoEnvironment:
    """One task of LIBERO."""

    action_width, fps = 7, 20.0

    def __init__(self, suites: Any, index: int, suite: str, image_size: int, gripper: str) -> None:
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        task = suites.get_task(index)
        self._starts = suites.get_task_init_states(index)
        self._instruction, self._gripper, self.max_steps = task.language, gripper, STEPS[suite]
        file = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
        self._env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=image_size, camera_widths=image_size)
        self._raw: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        """Begin at the stored start number `seed` (modulo their number), and let objects settle."""
        self._env.seed(seed)
        self._env.reset()
        self._raw = self._env.set_init_state(self._starts[seed % len(self._starts)])
        for _ in range(_SETTLE):
            self._raw = self._env.step(_IDLE)[0]

    def observe(self, views: Sequence[str] | None = None) -> Observation:
        """Observe; LIBERO renders at every step in any case."""
        pose = np.concatenate([self._raw["robot0_eef_pos"], axis_angle(self._raw["robot0_eef_quat"])])
        fingers = np.asarray(self._raw["robot0_gripper_qpos"], np.float32)
        states = {name: np.array([value], np.float32) for name, value in zip(_POSE, pose, strict=True)}
        whole = np.concatenate([pose, fingers]).astype(np.float32)
        return Observation(
            views={"image": self._upright("agentview_image"), "wrist_image": self._upright("robot0_eye_in_hand_image")},
            states={**states, "gripper": fingers, "state": whole},
            instruction=self._instruction,
        )

    def _upright(self, name: str) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._raw[name][::-1, ::-1])

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action [7]; LIBERO's `done` is success."""
        action = np.array(action, np.float32)
        if self._gripper == "rlds":  # 1 opens; the simulator opens at -1
            action[-1] = -1.0 if action[-1] > 0.5 else 1.0
        self._raw, _, done, _ = self._env.step(action)
        return bool(done)

    def picture(self) -> NDArray[np.uint8]:
        """The agent view."""
        return self._upright("agentview_image")

    def close(self) -> None:
        """Close the simulator."""
        self._env.close()


def axis_angle(quaternion: Any) -> NDArray[np.float64]:
    """Rotation axis times angle in radians [3], of a quaternion (x, y, z, w)."""
    vector, scalar = np.asarray(quaternion[:3], np.float64), float(np.clip(quaternion[3], -1, 1))
    sine = np.sqrt(1 - scalar * scalar)
    return np.zeros(3) if sine < 1e-8 else vector / sine * 2 * np.arccos(scalar)
