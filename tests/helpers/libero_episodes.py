"""Synthetic episodes for examples/libero's datasets; the brightness of a frame tells its time and view."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples.libero.dataset import Episode, Recording


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


LENGTHS = {"take the box": (12, 20), "take the can": (9,)}


def toy_recording(root: Path, layout: str = "v3.0", actions: bool = True, lengths: dict = LENGTHS) -> Path:
    """A whole dataset of toy episodes."""
    with Recording(root, layout, 32, actions, {"suite": "toy"}) as recording:
        for task, each in lengths.items():
            for length in each:
                recording.add(task, toy_episode(length, task, actions=actions), start=length)
    return root
