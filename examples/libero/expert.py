"""A scripted expert for LIBERO's pick-and-place tasks: all of libero_object and libero_spatial.

    lara serve examples.libero.expert:expert                     # also noisy_expert
    lara eval all --simulator libero --setting suite=libero_object --setting privileged=True --output outputs/expert

It needs the privileged states of the simulator, which a policy that learns from images must not see.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from examples.libero.hand import FULLY, OPEN, Hand
from examples.libero.scene import Array, Scene, middle
from lara_adapter.serving import ModalityConfig

DEEP = 0.05  # metres; what is higher is a basket, into which things are dropped


class Expert(Hand):
    """Takes the task's object from above, and puts it on or into the other; begins again when it slipped.

    Attributes:
        attempts: grasps so far.
    """

    attempts = 0

    def play(self) -> Generator[Array, None, None]:
        """See :class:`Hand`."""
        refused: list[float] = []
        while True:
            self.attempts += 1
            if (yield from self.take("target", refused)):
                goal = self.scene.points("goal")
                top = goal[:, 2].max()
                height = top + (-0.03 if np.ptp(goal[:, 2]) > DEEP else 0.01)
                if (yield from self.bring("target", middle(goal), top, height)):
                    yield from self.wait(FULLY, OPEN)
            yield from self.rise("target")


class ServedExpert:
    """The expert as a policy: one action at a time, for one client, from the simulator's privileged states."""

    def __init__(self, noise: float = 0.0) -> None:
        self._noise, self._expert, self._seed = noise, Expert(noise), 0

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Inputs and outputs: no camera; without an entry for states it gets all of them."""
        return {
            "video": ModalityConfig([0], []),
            "action": ModalityConfig([0], ["action"]),
            "language": ModalityConfig([0], ["task"]),
        }

    def reset(self, options: dict[str, Any] | None = None) -> None:
        """Begin an episode; `options={"seed": int}` seeds the noise."""
        self._expert = Expert(self._noise, seed=(options or {}).get("seed", 0))

    def get_action(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Act for one environment; its states are [1, 1, D] each. The gripper's 1 opens and 0 closes ("rlds")."""
        states = {name: state[0, 0] for name, state in observation["state"].items()}
        if "target.points" not in states:
            raise ValueError("the expert needs privileged states: lara eval --setting privileged=True")
        action = self._expert.act(Scene(states))
        action[-1] = float(action[-1] < 0)
        return {"action": action[None, None]}


def expert() -> ServedExpert:
    """Without noise."""
    return ServedExpert()


def noisy_expert() -> ServedExpert:
    """With the noise of the recorded demonstrations."""
    return ServedExpert(noise=0.1)
