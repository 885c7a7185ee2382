"""A real LeRobotDataset (v3.0) on disk whose frames tell their episode and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS, PIXELS, LENGTHS = 30, 32, (14, 9, 20)  # episodes of different lengths, several in one video file
TOP, WRIST = "observation.images.top", "observation.images.wrist"


def picture(episode: int, time: int, camera: str = TOP) -> np.ndarray:
    """Coarse, so that a lossy codec keeps it: the left half's grey tells the time, the right half's the episode."""
    image = np.full((PIXELS, PIXELS, 3), 20 + 60 * episode + (15 if camera == WRIST else 0), np.uint8)
    image[:, : PIXELS // 2] = 10 + 11 * time
    return image


def read_picture(frame: torch.Tensor) -> tuple[int, int]:
    """(episode, time) of a uint8 frame [3, H, W]; of a frame of TOP."""
    half = frame.shape[-1] // 2
    left, right = (frame[..., part].float().mean() for part in (slice(1, half - 1), slice(half + 1, -1)))
    return round((float(right) - 20) / 60), round((float(left) - 10) / 11)


def make_dataset(root: Path, dtype: str = "video", cameras: tuple[str, ...] = (TOP,), lengths=LENGTHS) -> Path:
    names = ["height", "width", "channels"]
    dataset = LeRobotDataset.create(
        repo_id="local/tiny",
        fps=FPS,
        root=root,
        robot_type="toy",
        use_videos=dtype == "video",
        features={
            **{camera: {"dtype": dtype, "shape": (PIXELS, PIXELS, 3), "names": names} for camera in cameras},
            "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "g"]},
            "action": {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "g"]},
        },
    )
    for episode, length in enumerate(lengths):
        for time in range(length):
            dataset.add_frame(
                {
                    **{camera: picture(episode, time, camera) for camera in cameras},
                    "observation.state": np.full(4, time, np.float32),
                    "action": np.array([time, episode + 2 * time % 5, time % 3], np.float32)
                    / 10,  # none constant in an episode
                    "task": "push the block",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def open_dataset(root: Path, **arguments: Any) -> LeRobotDataset:
    return LeRobotDataset("local/tiny", root=root, **{"return_uint8": True, **arguments})
