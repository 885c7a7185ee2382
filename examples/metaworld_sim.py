"""Meta-World as the quickstart needs it: a fast camera, scripted experts, distractors, and a search for OpenGL.

What is done here against the simulator's traps (each was met):

* A process renders with the library that `MUJOCO_GL` names at import; a failed import poisons the process. So
  :func:`find_gl` tries in child processes, and only children that were *spawned* (never forked) render.
* Shadows, reflections and multi-sampling cost a factor of ten on a CPU and are off.
* The default camera is upside down; a free camera looks at the table.
* An expert succeeds only after `set_task`: without it a part of the goal stays hidden from it.
* All environments of a task share one `Renderer`, which lives as long as the process.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAME_SKIP = 2  # a frame is kept at each second step of the environment
_STARTS_PER_BENCHMARK = 50  # Meta-World draws 50 starts per seed

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='.5'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().any()
renderer.close()
"""


class GLMissing(RuntimeError):
    """No OpenGL library works on this machine; the message says what to install."""


def _gl_works(name: str) -> bool:
    """Render one image with the back end `name` in a process of its own."""
    environment = {**os.environ, "MUJOCO_GL": name}
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


def find_gl(*, install: bool = True) -> str:
    """Find an OpenGL back end that renders, and set `MUJOCO_GL` to it for every process started later.

    Tries what `MUJOCO_GL` says, then EGL, then OSMesa. On Debian, as root, the libraries are installed where none works.

    Args:
        install: whether apt-get may be used.

    Returns:
        The name of the back end: "egl", "osmesa", or "cgl" on macOS.

    Raises:
        GLMissing: nothing works and nothing could be installed.
    """
    names = ["cgl"] if sys.platform == "darwin" else ["egl", "osmesa"]
    if wanted := os.environ.get("MUJOCO_GL"):
        names = [wanted, *(name for name in names if name != wanted)]
    rounds: list[list[str]] = [[]]
    if install and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        # newer Debian releases have no libosmesa6, so it is asked for only if EGL still fails
        rounds += [["libegl1", "libopengl0", "libgl1-mesa-dri"], ["libosmesa6"]]
    for packages in rounds:
        if packages:
            print(f"No OpenGL library renders here; installing {' '.join(packages)} with apt-get ...")
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "update"], env=environment, check=False, **quiet)
            command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
            subprocess.run(command, env=environment, check=False, **quiet)
        for name in names:
            if _gl_works(name):
                os.environ["MUJOCO_GL"] = name
                return name
    raise GLMissing(
        "MuJoCo cannot render on this machine: neither EGL nor OSMesa works.\n"
        "Install one of them and start again, on Debian or Ubuntu:\n"
        "    sudo apt-get update && sudo apt-get install -y libegl1 libopengl0 libgl1-mesa-dri\n"
        "    sudo apt-get install -y libosmesa6        # if EGL still does not work\n"
        "on Fedora: sudo dnf install mesa-libEGL mesa-dri-drivers"
    )


@dataclasses.dataclass(frozen=True)
class Distractors:
    """What spoils one frame: random light, and two coloured squares at random places.

    It depends on one seed only, so a frame looks the same whenever it is asked for, and unlike any other. Nothing of it
    has to do with the robot: an honest latent action should ignore it.

    Attributes:
        gain: factor on the light, 0.75 to 1.25.
        squares: (top, left, side) in pixels; sides of 10 to 21 in a frame of 64.
        colours: one [3] array in [0, 255] for each square.
    """

    gain: float
    squares: list[tuple[int, int, int]]
    colours: list[NDArray[np.float64]]

    @classmethod
    def draw(cls, seed: int, frame_size: int = 64) -> Distractors:
        """Draw the distractors of one frame."""
        random = np.random.default_rng(seed)
        gain, squares, colours = float(random.uniform(0.75, 1.25)), [], []
        for _ in range(2):
            side = round(int(random.integers(10, 22)) * frame_size / 64)
            top, left = (int(value) for value in random.integers(0, frame_size - side + 1, 2))
            squares.append((top, left, side))
            colours.append(random.uniform(0, 255, 3))
        return cls(gain, squares, colours)

    def spoil(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a spoilt copy of a frame [3, H, W]."""
        changed = frame * self.gain
        for (top, left, side), colour in zip(self.squares, self.colours):
            changed[:, top : top + side, left : left + side] = colour[:, None, None]
        return changed.clip(0, 255).astype(np.uint8)

    def mask(self, frame_size: int = 64) -> NDArray[np.bool_]:
        """Return where the squares are: [H, W]."""
        covered = np.zeros((frame_size, frame_size), dtype=bool)
        for top, left, side in self.squares:
            covered[top : top + side, left : left + side] = True
        return covered


def add_distractors(frames: NDArray[np.uint8], seeds: Iterable[int]) -> NDArray[np.uint8]:
    """Spoil frames [N, 3, H, W], each by the distractors of its own seed; returns new frames."""
    size = frames.shape[-1]
    return np.stack([Distractors.draw(int(seed), size).spoil(frame) for frame, seed in zip(frames, seeds, strict=True)])


@dataclasses.dataclass
class Episode:
    """One recorded episode.

    Attributes:
        frames: [ceil(T / FRAME_SKIP), 3, H, W] uint8: the clean frames before steps 0, 2, 4, ...
        states: [T, 4] float32: hand x, y, z and gripper opening before each step.
        actions: [T, 4] float32 in [-1, 1]: what was done at each step.
        success: whether the task was solved.
    """

    frames: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: bool


class Scene:
    """Several environments of one Meta-World task behind one renderer."""

    def __init__(self, task: str, num_envs: int = 1, image_size: int = 64) -> None:
        """Build the environments (0.1 s each).

        Args:
            task: a Meta-World task, without the version: "drawer-open".
            num_envs: how many.
            image_size: side of the frames in pixels.
        """
        import mujoco
        from metaworld import MT1
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")  # experts saturate; we clip
        self._mujoco, self._benchmark = mujoco, MT1
        self.name = f"{task}-v3"
        if self.name not in ENV_POLICY_MAP:
            known = ", ".join(sorted(name.removesuffix("-v3") for name in ENV_POLICY_MAP))
            raise ValueError(f"Meta-World has no task {task!r} with a scripted expert; it has {known}")
        self.image_size = image_size
        self.expert = ENV_POLICY_MAP[self.name]()
        self._starts: dict[int, list[Any]] = {}
        environment = MT1(self.name, seed=0).train_classes[self.name]
        self.envs = [environment() for _ in range(num_envs)]
        for env in self.envs:
            env.model.vis.quality.offsamples = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        # close enough for 64 pixels, high enough that the hand stays in view
        self._camera.lookat[:] = (0.0, 0.64, 0.17)
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 1.15, 135, -30
        self._renderers: dict[int, Any] = {}

    def reset(self, split: int, index: int, env: int = 0) -> NDArray[np.float64]:
        """Put an environment at a start position.

        Args:
            split: which set of starts (demonstrations, held-out, ...); sets share no start.
            index: which start of the set; any number.
            env: which environment.

        Returns:
            The simulator's full observation, for the expert; a policy gets :meth:`state` and :meth:`render`.
        """
        seed = 1000 * split + index // _STARTS_PER_BENCHMARK
        if seed not in self._starts:
            self._starts[seed] = self._benchmark(self.name, seed=seed).train_tasks
        self.envs[env].set_task(self._starts[seed][index % _STARTS_PER_BENCHMARK])
        return self.envs[env].reset()[0]

    def step(self, action: NDArray[np.float32], env: int = 0) -> tuple[NDArray[np.float64], bool]:
        """Do one step; returns the full observation and whether the task is solved."""
        observation, _, _, _, info = self.envs[env].step(action)
        return observation, bool(info["success"])

    @staticmethod
    def state(observation: NDArray[np.float64]) -> NDArray[np.float32]:
        """Take what a robot knows of itself from the full observation: [4] hand x, y, z, gripper opening."""
        return observation[:4].astype(np.float32)

    def render(self, env: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        """Return what the camera sees: [3, size, size] uint8, in the size that policies get if none is given."""
        size = size or self.image_size
        if size not in self._renderers:
            self._renderers[size] = self._mujoco.Renderer(self.envs[0].model, size, size)
            # before the GL library itself goes, else it complains at exit
            atexit.register(self._renderers[size].close)
        renderer = self._renderers[size]
        renderer.update_scene(self.envs[env].data, self._camera)
        flags = self._mujoco.mjtRndFlag  # update_scene sets them again, so they are cleared each time
        renderer.scene.flags[flags.mjRND_SHADOW] = 0
        renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return renderer.render().transpose(2, 0, 1).copy()

    def record(self, split: int, index: int, *, max_steps: int, after_success: int = 0, noise: float = 0.0) -> Episode:
        """Let the scripted expert act, or a noisy one.

        Args:
            split: which set of starts.
            index: which start.
            max_steps: the episode ends here at the latest.
            after_success: steps that follow the first success.
            noise: 0 is the expert. Above, a slowly varying random action is added and some time the expert is ignored:
                play, of which a latent action model sees many movements.

        Returns:
            The episode.
        """
        random = np.random.default_rng([split, index])
        strength = noise * random.uniform(0.5, 1.5)
        observation, drift, left = self.reset(split, index), np.zeros(4), after_success
        frames, states, actions, success = [], [], [], False
        for step in range(max_steps):
            action = np.clip(self.expert.get_action(observation), -1, 1)
            if noise:
                if step % 16 == 0:
                    attention = random.choice([1.0, 1.0, 0.5, 0.0])
                drift = 0.9 * drift + 0.45 * random.standard_normal(4)
                action = np.clip(attention * action + strength * drift, -1, 1)
            if step % FRAME_SKIP == 0:
                frames.append(self.render())
            states.append(self.state(observation))
            actions.append(action.astype(np.float32))
            observation, solved = self.step(actions[-1])
            success = success or solved
            if success and not noise:
                left -= 1
                if left < 0:
                    break
        return Episode(np.stack(frames), np.stack(states), np.stack(actions), success)
