"""Where a parallel gripper that points down can take an object: plain geometry on points."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from examples.libero.scene import Array, middle

# The Panda hand, open, seen from the point between its pads, in metres: extent along the fingers' axis u, across it w,
# and from that point upwards.
_FINGER_U, _FINGER_W, _TIP = (0.038, 0.067), 0.014, -0.010
_HAND_U, _HAND_W, _PALM = 0.104, 0.037, 0.030
_MARGIN = 0.004  # for the errors of the arm
_WIDEST = 0.075  # the fingers open 0.0776


@dataclasses.dataclass(frozen=True)
class Grasp:
    """A grasp from above.

    Attributes:
        place: [3] of the point between the pads, in metres.
        angle: of the axis through the fingers, in radians; the fingers are alike, so modulo pi.
        cost: smaller is better; from 1 on the hand would touch something else.
    """

    place: Array
    angle: float
    cost: float


def direction(angle: float) -> Array:
    """Unit vector [2]."""
    return np.array([np.cos(angle), np.sin(angle)])


def turn(angle: float, present: float) -> float:
    """The smaller way from one direction of the fingers' axis to another: in [-pi/2, pi/2)."""
    return (angle - present + np.pi / 2) % np.pi - np.pi / 2


def touched(points: Array, place: Array, angle: float, margin: float = 0.0) -> int:
    """How many points [N, 3] are inside of the open hand at a grasp, or above it on its way down.

    Args:
        points: of obstacles, in metres.
        place: [3] of the point between the pads.
        angle: of the fingers' axis, in radians.
        margin: by which the hand is larger, in metres.
    """
    relative = points - place
    u = np.abs(relative[:, :2] @ direction(angle))
    w = np.abs(relative[:, :2] @ direction(angle + np.pi / 2))
    z = relative[:, 2]
    finger = (u > _FINGER_U[0] - margin) & (u < _FINGER_U[1] + margin) & (w < _FINGER_W + margin) & (z > _TIP)
    palm = (u < _HAND_U + margin) & (w < _HAND_W + margin) & (z > _PALM)
    return int((finger | palm).sum())


def candidates(points: Array) -> Iterator[tuple[Array, float, float]]:
    """Grasps of an object [N, 3], as (place [3], angle, cost): across where it is narrow, and at the rim if it is wide."""
    top, bottom = points[:, 2].max(), points[:, 2].min()
    flat = points[:, :2]
    across = []
    for angle in np.arange(36) * np.pi / 36:
        u, v = direction(angle), direction(angle + np.pi / 2)
        along, aside = flat @ u, flat @ v
        centre = (along.max() + along.min()) / 2 * u + (aside.max() + aside.min()) / 2 * v
        across.append((angle, np.ptp(along), np.ptp(aside), centre))
    narrow = min(width for _, width, _, _ in across)
    if narrow <= _WIDEST:
        z = max(bottom + 0.006, min(top - 0.025, bottom + 0.75 * (top - bottom)))
        for angle, width, length, centre in across:
            if width > min(_WIDEST, narrow + 0.01):
                continue
            for higher in {z, max(z, min(top - 0.012, bottom + 0.9 * (top - bottom)))}:
                for share in (0.0, -0.15, 0.15, -0.3, 0.3):  # along the object, where a neighbour is in the way
                    place = centre + share * length * direction(angle + np.pi / 2)
                    cost = 20 * (width - narrow) + 5 * (higher - z) + 3 * abs(share) * length
                    yield np.array([*place, higher]), float(angle), cost
        return
    centre = middle(points)
    for angle in np.arange(36) * np.pi / 18:
        radius = (flat @ direction(angle)).max() - centre @ direction(angle)
        for inwards in (
            0.006,
            0.014,
            0.022,
            0.03,
        ):  # further in, the outer finger passes a near wall; closing pulls the object
            for depth in (0.025, 0.018, 0.012):
                place = np.array([*(centre + (radius - inwards) * direction(angle)), top - depth])
                yield place, float(angle), 8 * (inwards - 0.006) + 4 * (0.025 - depth)


def choose(points: Array, obstacles: Sequence[Array], present: float, refused: Sequence[float] = ()) -> Grasp:
    """The best grasp of an object.

    Args:
        points: of the object, [N, 3].
        obstacles: of each other thing, [N, 3].
        present: angle of the hand now; turning costs.
        refused: angles that failed before.
    """
    near = [other[np.linalg.norm(other[:, :2] - middle(points), axis=1) < 0.3] for other in obstacles]
    others = np.concatenate([*near, np.empty((0, 3))])
    others = others[others[:, 2] > points[:, 2].min() + 0.003]  # not what it stands on
    best: Grasp | None = None
    for place, angle, cost in candidates(points):
        cost += 0.1 * abs(turn(angle, present)) + sum(np.cos(angle - bad) > 0.9 for bad in refused)
        if best is None or cost < best.cost:  # the counts are slow
            cost += 0.5 * (_crowded(others, points, place, angle) > 0)
            hits = touched(others, place, angle)
            cost += 1 + 0.05 * hits if hits else 0.1 * (touched(others, place, angle, _MARGIN) > 0)
            if best is None or cost < best.cost:
                best = Grasp(place, angle, float(cost))
    assert best is not None
    return best


def _crowded(others: Array, points: Array, place: Array, angle: float) -> int:
    """How many obstacle points are where closing fingers pull a wide object taken inside of its rim."""
    centre, u = middle(points), direction(angle)
    radius = ((points[:, :2] - centre) @ u).max()
    inwards = radius - (place[:2] - centre) @ u
    if np.ptp(points[:, :2] @ u) <= _WIDEST or inwards < 0.01:
        return 0
    level = others[others[:, 2] < points[:, 2].max()]
    return int((np.linalg.norm(level[:, :2] - centre + inwards * u, axis=1) < radius).sum())


def height_above(obstacles: Sequence[Array], place: Array, radius: float) -> float:
    """Highest point [m] of the obstacles within a radius of a place [2]; -inf: none."""
    heights = [points[np.linalg.norm(points[:, :2] - place, axis=1) < radius, 2] for points in obstacles]
    return float(max((some.max() for some in heights if some.size), default=-np.inf))


def free_height(
    obstacles: Sequence[Array], start: Array, end: Array, angle: float, lowest: float, held: Array | None = None,
    radius: float = 0.0,
) -> float:  # fmt: skip
    """The lowest height at which the hand can go straight from one place to another.

    Args:
        obstacles: [N, 3] each.
        start: [2] in metres.
        end: [2].
        angle: of the fingers' axis, in radians.
        lowest: height to begin with, in metres.
        held: [3], from the hand to the middle of the bottom of what is held; None: nothing is.
        radius: of what is held, in metres.
    """
    points = np.concatenate([*obstacles, np.empty((0, 3))])
    points = points[points[:, 2] > lowest - 0.2]
    way = [start + share * (end - start) for share in np.linspace(0, 1, 13)]
    for height in lowest + 0.02 * np.arange(20):
        if not any(_blocked(points, np.array([*place, height - 0.015]), angle, held, radius) for place in way):
            break
    return float(height)


def _blocked(points: Array, place: Array, angle: float, held: Array | None, radius: float) -> bool:
    if touched(points, place, angle):
        return True
    if held is None:
        return False
    away = points - place - held
    return bool(((np.linalg.norm(away[:, :2], axis=1) < radius) & (away[:, 2] > 0)).any())
