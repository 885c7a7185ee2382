"""A simulator small enough to check every number, also in a spawned process."""

from __future__ import annotations

import os

import numpy as np

from lara_adapter.evaluation import Observation


class Line:
    """A point on a line that must be moved to 1; the start depends on the seed. Odd seeds cannot be solved."""

    action_width, max_steps, fps = 1, 30, 40.0

    def __init__(self, world):
        self.world = world

    def reset(self, seed):
        if seed == self.world.dies_at:
            os._exit(9)
        self.seed, self.place, self.clock = seed, np.random.default_rng(seed).uniform(-0.5, 0.5), 0

    def observe(self, views=None):
        self.world.looks += 1
        picture = np.full((8, 8, 3), self.clock, np.uint8)
        return Observation({"line": picture}, {"place": np.float32([self.place])}, "go to 1")

    def step(self, action):
        self.world.steps += 1
        self.clock += 1
        self.world.actions.append(float(action[0]))
        if self.seed % 2 == 0:
            self.place += float(action[0])
        return bool(self.place > 1)

    def picture(self):
        return np.full((16, 16, 3), min(255, 8 * self.clock), np.uint8)

    def close(self):
        self.world.closed += 1


class Lines:
    name, settings = "lines", {"kind": "straight"}

    def __init__(self, dies_at: int | None = None):
        self.looks = self.steps = self.closed = 0
        self.actions = []
        self.dies_at = dies_at  # the process is killed when the episode of this seed begins

    def tasks(self):
        return ["short", "long"]

    def open(self, task):
        return Line(self)
