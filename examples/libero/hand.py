"""What the hand can do, as generators of actions, so that a script reads as what it does."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from examples.libero.grasps import Grasp, choose, free_height, turn
from examples.libero.scene import Array, Scene, middle

OPEN, CLOSED = -1.0, 1.0
STEP, SPIN = 0.05, 0.5  # metres and radians of an action of 1
FULLY = 10  # steps in which the fingers close or open
_STALLED = 6  # steps without progress
Moves = Generator[Array, None, bool]


class Hand:
    """A script of moves with noise; a subclass writes it as :meth:`play`.

    Attributes:
        scene: the present one.
    """

    scene: Scene

    def __init__(self, noise: float = 0.0, smoothness: float = 0.0, seed: int = 0) -> None:
        """Prepare an episode.

        Args:
            noise: standard deviation of Gaussian noise on the movement, in units of the action.
            smoothness: correlation of the noise from step to step, in [0, 1).
            seed: of all that is random.
        """
        self.random = np.random.default_rng(seed)
        self._noise, self._smoothness, self._error = noise, smoothness, np.zeros(3)
        self._script = self.play()
        self._hang = np.full(3, np.inf)

    def act(self, scene: Scene) -> NDArray[np.float32]:
        """The next action: float32 [7] in [-1, 1]: movement, rotation, gripper (-1 opens, 1 closes)."""
        self.scene = scene
        action = next(self._script)
        fresh = self._noise * self.random.standard_normal(3)
        self._error = self._smoothness * self._error + np.sqrt(1 - self._smoothness**2) * fresh
        action[:3] += self._error
        return np.clip(action, -1, 1).astype(np.float32)

    def play(self) -> Generator[Array, None, None]:
        """All actions of an episode, without end."""
        raise NotImplementedError

    def move(
        self, place: Callable[[], Array], grip: float, steps: int, near: float = 0.008, angle: float | None = None,
        gain: float = 2.5, go_on: Callable[[], bool] = lambda: True,
    ) -> Moves:  # fmt: skip
        """Move to a place.

        Args:
            place: [3] in metres; asked at each step.
            grip: OPEN or CLOSED.
            steps: at most.
            near: distance in metres that is near enough; up to 2 cm the hand also has to have slowed down.
            angle: of the fingers' axis, in radians; None: as it is.
            gain: share of the way that is made in a step, up to full speed.
            go_on: whether there is still a reason to move; asked at each step.

        Returns:
            Whether the hand got there.
        """
        past = [np.full(3, np.inf)] * _STALLED
        for _ in range(steps):
            away = place() - self.scene.hand
            turned = 0.0 if angle is None else turn(angle, self.scene.hand_angle)
            slow = np.linalg.norm(self.scene.hand - past[-1]) < near / 2 or near > 0.02
            if np.linalg.norm(away) < near and slow and abs(turned) < 0.06:
                return True
            # the arm comes to rest a little away from where it is sent, more so where it is stretched
            if np.linalg.norm(self.scene.hand - past[0]) < 0.002 and abs(turned) < 0.06:
                return bool(np.linalg.norm(away) < 0.03)
            if not go_on():
                return False
            past = [*past[1:], self.scene.hand]
            away *= gain / STEP
            away /= max(1.0, np.abs(away).max())  # straight, so that it stays on the way that was found free
            yield np.array([*away, 0, 0, np.clip(turned / SPIN, -1, 1), grip])
        return False

    def take(self, thing: str, refused: list[float]) -> Moves:
        """Approach from above, close, and lift a little.

        Args:
            thing: object to take.
            refused: angles of grasps that failed before; where this one fails, it is added.

        Returns:
            Whether the object came along.
        """
        for _ in range(3):  # an object that still slides or rolls is looked at again
            before = self.scene.points(thing)
            grasp = choose(before, self.scene.others(thing), self.scene.hand_angle, refused[-3:])
            self._hang = np.full(3, np.inf)
            # a turn of nearly 90 degrees must not change its mind on the way
            angle = self.scene.hand_angle + turn(grasp.angle, self.scene.hand_angle)
            reached = yield from self._approach(thing, grasp, angle)
            if not reached or np.abs(self.scene.points(thing) - before).max() < 0.005:
                break
        if not reached:
            refused.append(grasp.angle)
            return False
        yield from self.move(lambda: grasp.place, OPEN, 40, 0.004, angle)
        yield from self.wait(FULLY, CLOSED, lambda: grasp.place)
        self._hang = self.scene.hand - self.held(thing)
        lifted = self.scene.hand + np.array([0, 0, 0.06])
        yield from self.move(lambda: lifted, CLOSED, 30, 0.02)
        came = self.holds(thing)
        self._hang = self.scene.hand - self.held(thing)  # what is held at its rim tilts
        if not came:
            refused.append(grasp.angle)
        return came

    def _approach(self, thing: str, grasp: Grasp, angle: float) -> Moves:
        """Move over a grasp, above what is on the way."""
        points = self.scene.points(thing)
        others = [*self.scene.others(thing), points]
        lowest = points[:, 2].max() + 0.06
        height = free_height(others, self.scene.hand[:2], grasp.place[:2], angle, lowest)
        if self.scene.hand[2] < height - 0.02:
            up = np.array([*self.scene.hand[:2], height])
            yield from self.move(lambda: up, OPEN, 30, 0.03)
        above = np.array([*grasp.place[:2], height])
        return (yield from self.move(lambda: above, OPEN, 70, 0.015, angle))

    def held(self, thing: str) -> Array:
        """Middle of the bottom of an object: [3]."""
        points = self.scene.points(thing)
        return np.array([*middle(points), points[:, 2].min()])

    def holds(self, thing: str) -> bool:
        """Whether an object is still where it was in the hand when the fingers had closed."""
        return bool(np.linalg.norm(self.scene.hand - self.held(thing) - self._hang) < 0.05)

    def bring(self, thing: str, centre: Array, top: float, height: float) -> Moves:
        """Carry what is held over a place [2], and lower it.

        Args:
            thing: object in the hand.
            centre: where to, [2] in metres.
            top: height of what is there, in metres; it is carried above.
            height: of its bottom at the end, in metres.

        Returns:
            Whether it is still held.
        """
        below = self.held(thing) - self.scene.hand
        radius = np.linalg.norm(self.scene.points(thing)[:, :2] - self.held(thing)[:2], axis=1).max()
        lift = free_height(
            self.scene.others(thing), self.scene.hand[:2], centre - below[:2], self.scene.hand_angle, top + 0.02 - below[2],
            below, radius,
        )  # fmt: skip
        start, clear = self.scene.hand[:2], lift + below[2]

        def bottom(z: float) -> float:  # what is held may tilt on the way, so its bottom decides
            return float(self.scene.hand[2] - self.held(thing)[2] + z)

        def over(z: float) -> Array:
            return np.array([*(centre + self.scene.hand[:2] - self.held(thing)[:2]), bottom(z)])

        for place, steps, near in (
            (lambda: np.array([*start, bottom(clear)]), 60, 0.03),
            (lambda: over(clear), 100, 0.012),
            (lambda: over(height), 60, 0.012),
        ):
            yield from self.move(place, CLOSED, steps, near, go_on=lambda: self.holds(thing))
        return self.holds(thing)

    def wait(self, steps: int, grip: float, place: Callable[[], Array] | None = None) -> Moves:
        """Stay, or stay at a place [3], while the fingers move."""
        for _ in range(steps):
            away = np.zeros(3) if place is None else np.clip(4 * (place() - self.scene.hand) / STEP, -1, 1)
            yield np.array([*away, 0, 0, 0, grip])
        return True

    def rise(self, thing: str, steps: int = 15) -> Moves:
        """Rise with open fingers; shake off an object that hangs between them."""
        for step in range(steps):
            hangs = step > 6 and self.holds(thing)
            way = (-1.0) ** (step // 2) * hangs
            yield np.array([0, way, 1.0 - hangs, 0, 0, way, OPEN])
        return True
