"""LIBERO's own random starts: for demonstrations, so that a policy is evaluated on starts that it has not seen."""

from __future__ import annotations

import numpy as np
from lara_adapter.integrations.simulators.libero import Libero, LiberoEnvironment

_SETTLE, _IDLE = 10, np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
_FLUNG = 0.15  # metres


class PlainLibero(Libero):
    """LIBERO whose seeds are random starts, not the stored ones."""

    def open(self, task: str) -> PlainEnvironment:
        """Build the environment of a task."""
        return PlainEnvironment(task, **self.settings)


class PlainEnvironment(LiberoEnvironment):
    """One task of LIBERO.

    Attributes:
        redrawn: starts that were drawn again.
    """

    redrawn = 0

    def reset(self, seed: int) -> None:
        """Begin at the random start of a seed, and let objects settle.

        LIBERO's starts may overlap, and an object is then flung off the table: such a start is drawn again.
        """
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            while not self._draw():
                self.redrawn += 1
        finally:
            np.random.set_state(state)

    def _draw(self) -> bool:
        """Draw a start; whether all objects stayed about where they were put.

        LIBERO places what is on or in a fixture by the site's position, which it takes to be relative to the fixture.
        That holds while the fixture is at the origin, as in a new model; after a soft reset objects fell from a metre up.
        """
        env = self.simulator
        model, data = env.sim.model, env.sim.data
        for fixture in env.env.fixtures_dict.values():
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body], model.body_quat[body] = 0, (1, 0, 0, 0)
        env.reset()
        for robot in env.robots:  # the gripper goes on from the last episode's motion otherwise
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        env.set_init_state(env.get_sim_state())  # also begins the sampling of observations anew
        bodies = [model.body_name2id(thing.root_body) for thing in env.env.objects_dict.values()]
        before = data.body_xpos[bodies].copy()
        for _ in range(_SETTLE):
            self._raw = env.step(_IDLE)[0]
        moved = data.body_xpos[bodies] - before
        return bool(np.linalg.norm(moved[:, :2], axis=1).max() < _FLUNG)
