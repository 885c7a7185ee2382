"""Meta-World for the examples: distractors, recorded experts, and OpenGL, which is installed if necessary.

The simulator itself and its camera are in lara_adapter/integrations/simulators/metaworld.py.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterable

import numpy as np
from lara_adapter.integrations.simulators import metaworld
from lara_adapter.integrations.simulators.metaworld import GLMissing
from numpy.typing import NDArray

FRAME_SKIP = 2  # a frame is kept at every second step of the environment


def find_gl(*, install: bool = True) -> str:
    """Find an OpenGL backend that renders, and set `MUJOCO_GL` to it for this process and its children.

    On Debian, as root, the libraries are installed if none works.

    Args:
        install: whether apt-get may be used.

    Returns:
        The name of the backend: "egl", "osmesa", or "cgl" on macOS.

    Raises:
        GLMissing: no backend works, and none could be installed.
    """
    rounds: list[list[str]] = []
    if install and shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        # newer Debian releases have no libosmesa6, so it is installed only if EGL still fails
        rounds = [["libegl1", "libopengl0", "libgl1-mesa-dri"], ["libosmesa6"]]
    while True:
        try:
            return metaworld.find_gl()
        except GLMissing:
            if not rounds:
                raise
        packages = rounds.pop(0)
        print(f"No OpenGL library renders here; installing {' '.join(packages)} with apt-get ...")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update"], env=environment, check=False, **quiet)
        command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        subprocess.run(command, env=environment, check=False, **quiet)


@dataclasses.dataclass(frozen=True)
class Distractors:
    """Distractors of one frame: random light, and two coloured squares at random places.

    They depend on one seed only, so a frame looks the same in every stage, and unlike any other. They are independent of
    the robot, so a good latent action ignores them.

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

    def apply(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a copy of a frame [3, H, W] with the distractors."""
        changed = frame * self.gain
        for (top, left, side), colour in zip(self.squares, self.colours):
            changed[:, top : top + side, left : left + side] = colour[:, None, None]
        return changed.clip(0, 255).astype(np.uint8)

    def mask(self, frame_size: int = 64) -> NDArray[np.bool_]:
        """Return the mask of the squares: [H, W]."""
        covered = np.zeros((frame_size, frame_size), dtype=bool)
        for top, left, side in self.squares:
            covered[top : top + side, left : left + side] = True
        return covered


def frame_seed(split: int, index: int, step: int = 0) -> int:
    """Number the frame of step `step` of start `index` in a set of starts; the seed of its distractors and noise."""
    return 10_000_000 * split + 1000 * index + step


def add_distractors(frames: NDArray[np.uint8], seeds: Iterable[int]) -> NDArray[np.uint8]:
    """Return copies of frames [N, 3, H, W], each with the distractors of its own seed."""
    size = frames.shape[-1]
    return np.stack([Distractors.draw(int(seed), size).apply(frame) for frame, seed in zip(frames, seeds, strict=True)])


@dataclasses.dataclass
class Episode:
    """One recorded episode.

    Attributes:
        frames: [ceil(T / frame_skip), 3, H, W] uint8: the clean frames before steps 0, frame_skip, 2 * frame_skip, ...
        states: [T, 4] float32: hand x, y, z and gripper opening before each step.
        actions: [T, 4] float32 in [-1, 1]: the action of each step.
        success: whether the task was solved.
    """

    frames: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    success: bool


class Scene(metaworld.Scene):
    """Several environments of one Meta-World task behind one renderer, with recording of the scripted expert."""

    def record(
        self,
        split: int,
        index: int,
        *,
        max_steps: int,
        after_success: int = 0,
        noise: float = 0.0,
        frame_skip: int = FRAME_SKIP,
    ) -> Episode:
        """Record an episode of the scripted expert, or of a noisy one.

        Args:
            split: number of the set of starts.
            index: number of the start.
            max_steps: maximal length of the episode.
            after_success: steps after the first success.
            noise: 0: the expert. Above 0: play, with a slowly varying random action added and the expert ignored part
                of the time, so that a latent action model sees many movements.
            frame_skip: a frame is kept every `frame_skip` steps.

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
            if step % frame_skip == 0:
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
