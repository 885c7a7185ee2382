"""Meta-World: a fast camera and scripted experts.

Pitfalls of the simulator that this code avoids:

* Shadows, reflections and multi-sampling make a CPU ten times slower and are off.
* The default camera is upside down; a free camera looks at the table.
* An expert succeeds only after `set_task`, which reveals the goal.
* All environments of a task share one `Renderer` per size (290 MB per task), closed before the GL library is unloaded.

Tested with metaworld 3.1.1 and mujoco 3.3.0.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.errors import HostNotInstalled, LaraArgumentError
from lara_adapter.evaluation import Observation

from .gl import GLMissing, find_gl, settle_gl

__all__ = ["GLMissing", "MetaWorld", "MetaWorldEnvironment", "Scene", "describe", "find_gl"]

INSTALL = "pip install metaworld==3.1.1 mujoco==3.3.0 packaging"
_STARTS_PER_BENCHMARK = 50  # Meta-World draws 50 starts per seed


def describe(task: str) -> str:
    """The instruction for a policy."""
    return task.replace("-", " ")


@functools.cache
def _starts(name: str, seed: int) -> list[Any]:
    from metaworld import MT1

    return list(MT1(name, seed=seed).train_tasks)


class Scene:
    """Several environments of one Meta-World task behind one renderer."""

    def __init__(self, task: str, num_envs: int = 1, image_size: int = 64) -> None:
        """Build the environments (0.1 s each) of a task, such as "drawer-open"; frames have `image_size` pixels a side."""
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")  # experts saturate; we clip
        self._mujoco = mujoco
        self.name = f"{task}-v3"
        if self.name not in ENV_POLICY_MAP:
            known = ", ".join(sorted(name.removesuffix("-v3") for name in ENV_POLICY_MAP))
            raise ValueError(f"Meta-World has no task {task!r} with a scripted expert; it has {known}")
        self.image_size = image_size
        expert: Any = ENV_POLICY_MAP[self.name]
        self.expert = expert()
        self.envs = [ALL_V3_ENVIRONMENTS[self.name]() for _ in range(num_envs)]
        for env in self.envs:
            env.model.vis.quality.offsamples = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        # close enough for 64 pixels, high enough that the hand stays in view
        self._camera.lookat[:] = (0.0, 0.64, 0.17)
        self._camera.distance, self._camera.azimuth, self._camera.elevation = 1.15, 135, -30
        self._renderers: dict[int, Any] = {}

    def reset(self, split: int, index: int, env: int = 0) -> NDArray[np.float64]:
        """Put environment number `env` at a start position.

        Args:
            split: set of starts (demonstrations, held-out, ...); no two sets share a start.
            index: number of the start in the set; unbounded.
            env: number of the environment.

        Returns:
            The simulator's full observation, for the expert; a policy gets :meth:`state` and :meth:`render`.
        """
        seed = 1000 * split + index // _STARTS_PER_BENCHMARK
        self.envs[env].set_task(_starts(self.name, seed)[index % _STARTS_PER_BENCHMARK])
        return self.envs[env].reset()[0]

    def step(self, action: NDArray[np.float32], env: int = 0) -> tuple[NDArray[np.float64], bool]:
        """Execute an action; returns the full observation and whether the task is solved."""
        observation, _, _, _, info = self.envs[env].step(action)
        return observation, bool(info["success"])

    @staticmethod
    def state(observation: NDArray[np.float64]) -> NDArray[np.float32]:
        """The robot's own state, out of the full observation: [4] hand x, y, z, gripper opening."""
        return observation[:4].astype(np.float32)

    def render(self, env: int = 0, size: int | None = None) -> NDArray[np.uint8]:
        """The camera's image: uint8 [3, size, size]; None: `image_size`."""
        size = size or self.image_size
        if size not in self._renderers:
            self._renderers[size] = self._mujoco.Renderer(self.envs[0].model, size, size)
            # before the GL library is unloaded, else it prints errors at exit
            atexit.register(self._renderers[size].close)
        renderer = self._renderers[size]
        renderer.update_scene(self.envs[env].data, self._camera)
        flags = self._mujoco.mjtRndFlag  # update_scene sets them again
        renderer.scene.flags[flags.mjRND_SHADOW] = 0
        renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return renderer.render().transpose(2, 0, 1).copy()

    def close(self) -> None:
        """Free the renderers; the scene cannot be used again."""
        for renderer in self._renderers.values():
            atexit.unregister(renderer.close)
            renderer.close()
        self._renderers.clear()
        self.envs.clear()


class MetaWorld:
    """The tasks of Meta-World, for :class:`lara_adapter.evaluation.Rollouts`.

    A policy is offered the view "front", the states "state" (hand x, y, z in metres, gripper opening) and "full" (the
    simulator's 39 numbers, for scripted experts), and the task's name as instruction. Actions are [4], clipped to
    [-1, 1]: hand movement and gripper.
    """

    name = "metaworld"

    def __init__(self, image_size: int = 64, split: int = 10_000) -> None:
        """Check that Meta-World and OpenGL work.

        Args:
            image_size: side of the view in pixels.
            split: set of starts; no two sets share a start, and the examples of this library record from low ones.

        Raises:
            HostNotInstalled: Meta-World is missing.
            GLMissing: no OpenGL library works.
            LaraArgumentError: a number is out of range.
        """
        if image_size < 16 or not 0 <= split < 1_000_000:
            raise LaraArgumentError(
                f"metaworld: {image_size=}, but at least 16 is expected, and {split=}, but 0 to 999999"
            )
        if importlib.util.find_spec("metaworld") is None:
            raise HostNotInstalled(f"Meta-World is not installed: {INSTALL}")
        settle_gl()
        self.settings: dict[str, Any] = {"image_size": image_size, "split": split}

    def tasks(self) -> list[str]:
        """Names of all tasks with a scripted expert, without their version."""
        from metaworld.policies import ENV_POLICY_MAP

        return sorted(name.removesuffix("-v3") for name in ENV_POLICY_MAP)

    def open(self, task: str) -> MetaWorldEnvironment:
        """Build the environment of a task."""
        return MetaWorldEnvironment(task, **self.settings)


class MetaWorldEnvironment:
    """One task of Meta-World."""

    action_width, max_steps, fps = 4, 500, 80.0

    def __init__(self, task: str, image_size: int, split: int) -> None:
        self._scene, self._split, self._instruction = Scene(task, image_size=image_size), split, describe(task)
        self._full: NDArray[np.float64] = np.zeros(39)

    def reset(self, seed: int) -> None:
        """Begin at start number `seed`."""
        self._full = self._scene.reset(self._split, seed)

    def observe(self, views: Sequence[str] | None = None) -> Observation:
        """Observe; nothing is rendered unless "front" is among the views."""
        render = views is None or "front" in views
        return Observation(
            views={"front": self._scene.render().transpose(1, 2, 0)} if render else {},
            states={"state": self._scene.state(self._full), "full": self._full.astype(np.float32)},
            instruction=self._instruction,
        )

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action [4], clipped to [-1, 1]."""
        self._full, solved = self._scene.step(np.clip(action, -1, 1).astype(np.float32))
        return solved

    def picture(self) -> NDArray[np.uint8]:
        """A larger image of the scene: [256, 256, 3]."""
        return self._scene.render(size=256).transpose(1, 2, 0)

    def close(self) -> None:
        """Free the renderers."""
        self._scene.close()
