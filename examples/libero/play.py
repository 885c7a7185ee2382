"""Play: the hand wanders smoothly about the objects, and takes some of them elsewhere."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from examples.libero.grasps import height_above
from examples.libero.hand import CLOSED, FULLY, OPEN, Hand, Moves
from examples.libero.scene import Array, middle

_LARGEST = 0.16  # metres; what is wider is a fixture or a basket, and stays
_REACH = 0.12  # metres around an object
_TURN = 0.8  # radians


class Play(Hand):
    """Moves without a task, for video from which a latent action model learns."""

    def play(self) -> Generator[Array, None, None]:
        """See :class:`Hand`."""
        home = self.scene.hand_angle
        while True:
            things = [
                name for name in self.scene.names if np.ptp(self.scene.points(name)[:, :2], axis=0).max() < _LARGEST
            ]
            thing = str(self.random.choice(things))
            if self.random.random() < 0.5:
                yield from self._visit(thing, home)
            else:
                yield from self._displace(thing)

    def _visit(self, thing: str, home: float) -> Moves:
        """Wander to a few places near a thing, above whatever is there."""
        for _ in range(self.random.integers(1, 4)):
            points = self.scene.points(thing)
            place = middle(points) + self.random.uniform(-_REACH, _REACH, 2)
            highest = max(height_above([*self.scene.others(thing), points], place, 0.12), points[:, 2].min())
            target = np.array([*place, highest + self.random.uniform(0.03, 0.15)])
            angle, gain = home + self.random.uniform(-_TURN, _TURN), self.random.uniform(0.4, 1.2)
            grip = float(self.random.choice([OPEN, OPEN, CLOSED]))
            yield from self.move(lambda t=target: t, grip, 30, 0.02, angle, gain)  # type: ignore[misc]
        return True

    def _displace(self, thing: str) -> Moves:
        """Take a thing, put it down nearby, also onto or into another, and rise."""
        if (yield from self.take(thing, [])):
            points, others = self.scene.points(thing), self.scene.others(thing)
            start = middle(points)
            place = np.clip(start + self.random.uniform(-0.2, 0.2, 2), [-0.25, -0.3], [0.2, 0.3])
            top = max(height_above(others, place, 0.06), points[:, 2].min())
            yield from self.bring(thing, place, top, top + 0.01)
            yield from self.wait(FULLY, OPEN)
        return (yield from self.rise(thing, 10))
