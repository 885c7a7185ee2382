"""Synthetic episodes for examples/libero's datasets; the brightness of a frame tells its time and view."""

from __future__ import annotations

import numpy as np

from examples.libero.dataset import Episode


def toy_episode(length: int = 12, task: str = "take the box", size: int = 32, actions: bool = True) -> Episode:
    random = np.random.default_rng(length)
    frames = np.zeros((length, size, size, 3), np.uint8)
    frames[:] = (10 * np.arange(length) % 250)[:, None, None, None]
    return Episode(
        views={"image": frames, "wrist_image": 255 - frames},
        states=random.normal(size=(length, 8)).astype(np.float32),
        actions=random.uniform(-1, 1, (length, 7)).astype(np.float32) if actions else None,
        task=task,
    )
