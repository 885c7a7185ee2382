"""The interface of a simulator, and how its observations become a request to the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import LaraArgumentError, ServingError
from ..serving import ModalityConfig

__all__ = ["Environment", "Layout", "Observation", "Simulator"]


@dataclasses.dataclass(frozen=True)
class Observation:
    """One time step.

    Attributes:
        views: camera -> uint8 [H, W, 3].
        states: name -> float32 [D].
        instruction: the task in words.
    """

    views: Mapping[str, NDArray[np.uint8]]
    states: Mapping[str, NDArray[np.float32]]
    instruction: str


class Environment(Protocol):
    """One task of a simulator.

    Attributes:
        action_width: numbers in an action.
        max_steps: length at which an unsolved episode has failed.
        fps: steps per second, for videos.
    """

    action_width: int
    max_steps: int
    fps: float

    def reset(self, seed: int) -> None:
        """Begin an episode; equal seeds are equal starts."""

    def observe(self, views: Sequence[str] | None = None) -> Observation:
        """Observe. `views`: the cameras that are needed; None: all."""

    def step(self, action: NDArray[np.float32]) -> bool:
        """Execute an action [action_width]; returns whether the task is solved."""

    def picture(self) -> NDArray[np.uint8]:
        """The scene for a video: uint8 [H, W, 3]."""

    def close(self) -> None:
        """Release the simulator."""


class Simulator(Protocol):
    """A set of tasks.

    Attributes:
        name: "metaworld".
        settings: its arguments; recorded in the report.
    """

    name: str
    settings: dict[str, Any]

    def tasks(self) -> list[str]:
        """Names of all tasks."""

    def open(self, task: str) -> Environment:
        """Build the environment of a task."""


class Layout:
    """Arranges observations as the policy expects them, in GR00T's layout with a batch of one."""

    def __init__(
        self, config: Mapping[str, ModalityConfig], offered: Observation, rename: Mapping[str, str] | None = None
    ) -> None:
        """Match the inputs of the policy with what the simulator offers.

        Args:
            config: from `get_modality_config`; empty: the policy gets everything, under the simulator's names.
            offered: any observation of the simulator.
            rename: name at the policy -> name at the simulator, where they differ.

        Raises:
            LaraArgumentError: the simulator does not offer an input of the policy.
        """
        rename = dict(rename or {})
        self.views = self._match("video", config, offered.views, rename)
        self.states = self._match("state", config, offered.states, rename)
        if rename:
            raise LaraArgumentError(f"rename: the policy has no input named {sorted(rename)}")
        self.language = ([*config["language"].modality_keys, "task"] if "language" in config else ["task"])[0]
        self.actions = list(config["action"].modality_keys) if "action" in config else None
        # an input without entries may have no time steps
        deltas = {kind: list(config[kind].delta_indices) if kind in config else [] for kind in ("video", "state")}
        self.deltas = {kind: steps or [0] for kind, steps in deltas.items()}
        if max(map(max, self.deltas.values())) > 0:
            raise LaraArgumentError(f"the policy expects observations of the future: {self.deltas}")
        self.history = 1 - min(map(min, self.deltas.values()))  # observations to keep

    @staticmethod
    def _match(
        kind: str, config: Mapping[str, ModalityConfig], offered: Mapping[str, Any], rename: dict[str, str]
    ) -> dict[str, str]:
        expected = config[kind].modality_keys if kind in config else list(offered)
        names = {name: rename.pop(name, name) for name in expected}
        missing = sorted(name for name in names.values() if name not in offered)
        if missing:
            raise LaraArgumentError(
                f"the policy expects the {kind} entries {expected}, but the simulator has no {missing}; it has "
                f"{sorted(offered)}. Map the names with --rename POLICY=SIMULATOR"
            )
        return names

    def request(self, past: Sequence[Observation]) -> dict[str, Any]:
        """Arrange the last observations, the present one last; the first one stands for those before it."""
        steps = {kind: [past[max(0, len(past) - 1 + delta)] for delta in self.deltas[kind]] for kind in self.deltas}
        views = {name: np.stack([o.views[own] for o in steps["video"]])[None] for name, own in self.views.items()}
        states = {name: np.stack([o.states[own] for o in steps["state"]])[None] for name, own in self.states.items()}
        return {
            "video": views,
            "state": {name: state.astype(np.float32) for name, state in states.items()},
            "language": {self.language: [[past[-1].instruction]]},
        }

    def chunk(self, action: Any, width: int) -> NDArray[np.float32]:
        """The policy's action as one array.

        Args:
            action: {key: [1, H, D]}, [1, H, A] or [H, A].
            width: of the simulator's actions.

        Returns:
            [H, width].

        Raises:
            ServingError: it has another form or width.
        """
        if isinstance(action, Mapping):
            names = self.actions or list(action)
            if set(names) - set(action):
                raise ServingError(f"the policy's action has {sorted(action)}, but {names} is expected")
            try:
                array = np.concatenate([np.asarray(action[name], np.float32) for name in names], axis=-1)
            except ValueError as error:
                raise ServingError(f"the parts {names} of the policy's action do not fit together: {error}") from error
        else:
            array = np.asarray(action, np.float32)
        if array.ndim == 3 and len(array) == 1:
            array = array[0]
        if array.ndim != 2 or len(array) == 0 or array.shape[1] != width:
            raise ServingError(f"the policy's action has shape {list(array.shape)}, but [1, H, {width}] is expected")
        return array
