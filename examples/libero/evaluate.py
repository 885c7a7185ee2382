"""Several policies on one task of LIBERO, from the same starts, in this process: `lara eval` without a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lara_adapter.integrations.simulators.libero import Libero, LiberoEnvironment

from examples.demo.stages import Progress
from examples.libero.served import ServedLiberoPolicy
from lara_adapter.evaluation.rollout import Rollouts
from lara_adapter.storage.files import write_json


class LocalClient:
    """What Rollouts asks of a PolicyClient, answered by a policy in this process."""

    def __init__(self, policy: ServedLiberoPolicy, description: str) -> None:
        self.get_modality_config, self._policy, self._description = policy.get_modality_config, policy, description

    def describe(self) -> dict[str, Any]:
        """As a server describes itself."""
        return {"policy": self._description, "server": "none", "options": True}

    def reset(self, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """Nothing is kept between requests."""
        return {}

    def get_action(
        self, observation: dict[str, Any], options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """See :meth:`ServedLiberoPolicy.get_action`."""
        return self._policy.get_action(observation, options), {}


class OneTask(Libero):
    """LIBERO whose environment stays open from policy to policy; building one takes seconds."""

    _environment: LiberoEnvironment | None = None

    def open(self, task: str) -> LiberoEnvironment:
        """The environment of the one task."""
        if self._environment is None:
            self._environment = super().open(task)
            self.end, self._environment.close = self._environment.close, lambda: None  # type: ignore[method-assign]
        return self._environment

    def end(self) -> None:
        """Close the simulator."""


def closed_loop(
    folder: Path,
    progress: Progress,
    *,
    task: str,
    policies: dict[str, Path],
    starts: list[int],
    execute: int,
    world: dict[str, Any],
) -> None:
    """Evaluate every policy on one task. A job.

    Args:
        folder: gets `outcomes.json`: policy -> {"solved": "0" or "1" for each start, "steps": of each}; and for each policy
            what `lara eval` writes.
        progress: called after each episode.
        task: name of the task.
        policies: folder of each.
        starts: numbers of LIBERO's stored starts.
        execute: actions of a chunk that are executed before the next is sampled.
        world: settings of :class:`Libero`.
    """
    simulator, outcomes = OneTask(**world), {}
    for name, trained in policies.items():
        client: Any = LocalClient(ServedLiberoPolicy.load(trained), name)
        rollouts = Rollouts(client, simulator, folder / name, execute=execute)
        rollouts.run([task], starts, progress=lambda *_: progress(1))
        episodes = [rollouts.store.finished(task, start) or {} for start in starts]
        outcomes[name] = {
            "solved": "".join(str(int(episode["success"])) for episode in episodes),
            "steps": [episode["steps"] for episode in episodes],
        }
    simulator.end()
    write_json(folder / "outcomes.json", outcomes)
