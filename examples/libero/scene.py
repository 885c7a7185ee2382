"""What a scripted expert knows at one moment: the simulator's privileged states, as an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_SPACING = 0.015  # metres between points on a box
_POINTS = ".points"
ROLES = ("target", "goal")  # second names of the task's objects of interest


class Scene:
    """The states that LIBERO's adapter (integrations/simulators/libero.py) offers with `privileged`.

    Attributes:
        hand: the point between the finger pads: [3] in metres.
        hand_angle: direction from the right finger to the left one in the table's plane, in radians.
    """

    def __init__(self, states: Mapping[str, NDArray[Any]]) -> None:
        """Wrap the states of one observation, each [D]."""
        self._states = states
        self.hand: Array = np.asarray(states["state"][:3], np.float64)
        x, y, _ = np.asarray(states["fingers"][:3], np.float64) - states["fingers"][3:6]
        self.hand_angle = float(np.arctan2(y, x))

    @property
    def names(self) -> list[str]:
        """Objects and fixtures."""
        names = [name.removesuffix(_POINTS) for name in self._states if name.endswith(_POINTS)]
        return [name for name in names if name not in ROLES and self._states[name + _POINTS].size]

    def points(self, name: str) -> Array:
        """Corners of the collision shape of an object, a fixture, "target" or "goal": [N, 3] in metres."""
        return np.asarray(self._states[name + _POINTS], np.float64).reshape(-1, 3)

    def others(self, name: str) -> list[Array]:
        """Points on everything but one object, dense on boxes: [N, 3] each."""
        own = self._states[name + _POINTS]  # of "target" there are two
        others = [other for other in self.names if not np.array_equal(self._states[other + _POINTS], own)]
        return [dense(self.points(other)) for other in others]


def middle(points: Array) -> Array:
    """Centre of the bounding box of points [N, 3] in the plane: [2]."""
    return (points[:, :2].max(0) + points[:, :2].min(0)) / 2


def dense(points: Array, spacing: float = _SPACING) -> Array:
    """Add points on the surface of each box, whose eight corners follow each other in `points` [N, 3]."""
    parts, start = [points], 0
    while start + 8 <= len(points):
        corners = points[start : start + 8]
        a, b, c = (corners[i] - corners[0] for i in (4, 2, 1))
        box = corners[0] + np.array([0 * a, c, b, b + c, a, a + c, a + b, a + b + c])
        if np.abs(box - corners).max() > 1e-5:  # of a mesh
            start += 1
            continue
        edges = np.stack([a, b, c])
        shares = [np.linspace(0, 1, 2 + int(length / spacing)) for length in np.linalg.norm(edges, axis=1)]
        grid = np.stack(np.meshgrid(*shares, indexing="ij"), -1).reshape(-1, 3)
        surface = grid[((grid == 0) | (grid == 1)).any(1)]
        parts.append(corners[0] + surface @ edges)
        start += 8
    return np.concatenate(parts)
