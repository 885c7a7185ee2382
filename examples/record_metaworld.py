"""Record scripted experts of Meta-World into a real LeRobotDataset (v3.0, video), for lerobot_posttrain.py.

    python examples/record_metaworld.py --root data/drawer --tasks drawer-open --episodes 25

One row per step of the environment: camera, state and the expert's action. Only solved episodes are kept. The folder is
written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lara_adapter.integrations.simulators.metaworld import describe
from metaworld_sim import GLMissing, Scene, add_distractors, find_gl, frame_seed

from lara_adapter.storage.files import read_json, replace_folder, write_json

NEEDS = (
    "pip install 'lerobot[training,multi_task_dit]==0.6.1' metaworld==3.1.1 mujoco==3.3.0 packaging tyro "
    "(Python 3.12; see docs/hosts/lerobot.md)"
)
CAMERA = "observation.images.front"
WORLD_FILE = "metaworld.json"  # beside LeRobot's own folders: the world for the evaluation
MAX_STEPS = 150  # an episode that is not solved by then is dropped
AFTER_SUCCESS = 8


@dataclasses.dataclass(frozen=True)
class World:
    """Settings of a recording that its evaluation needs.

    Attributes:
        tasks: Meta-World tasks.
        image_size: side of the frames, in pixels.
        distractors: whether every frame has random light and squares.
        seed: of the recording; an evaluation uses other starts.
    """

    tasks: tuple[str, ...] = ("drawer-open",)
    image_size: int = 64
    distractors: bool = False
    seed: int = 0

    @classmethod
    def read(cls, root: Path) -> World | None:
        """Read the settings from a dataset's folder; None for a dataset that :func:`record` did not write."""
        if not (root / WORLD_FILE).is_file():
            return None
        content = read_json(root / WORLD_FILE)
        return cls(**{**content, "tasks": tuple(content["tasks"])})

    def see(self, frames: np.ndarray, split: int, index: int, step: int = 0) -> np.ndarray:
        """Add this world's distractors, if any, to frames [N, 3, H, W] of one episode from a step on."""
        if not self.distractors:
            return frames
        return add_distractors(frames, frame_seed(split, index, step) + np.arange(len(frames)))


def require(*modules: str) -> None:
    """Exit with status 2 and one line that says what to install if a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{Path(sys.argv[0]).name} needs {', '.join(missing)}: {NEEDS}", file=sys.stderr)
        raise SystemExit(2)


def quieten() -> None:
    """Silence the video codecs, the progress bars of datasets, and LeRobot's note about falling back to PyAV."""
    os.environ.setdefault("SVT_LOG", "1")
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    import av
    import datasets

    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()


def progress_bar(total: int, title: str, **options: Any) -> Any:
    """A tqdm bar that is redrawn less often when written to a file."""
    from tqdm import tqdm

    return tqdm(total=total, desc=title, mininterval=0.5 if sys.stderr.isatty() else 10.0, **options)


def splits(seed: int) -> tuple[int, int]:
    """Two disjoint sets of starts: for recording and for evaluation."""
    return 2 * seed, 2 * seed + 1


def record(root: Path, repo_id: str, world: World, episodes: int, fps: int) -> dict[str, int]:
    """Record a dataset; call :func:`metaworld_sim.find_gl` first.

    Args:
        root: folder of the new dataset, which must not exist.
        repo_id: its name, "user/name".
        world: settings of the recording.
        episodes: solved episodes of each task.
        fps: of the time stamps.

    Returns:
        For each task the number of episodes dropped because the expert failed.

    Raises:
        FileExistsError: `root` exists.
        RuntimeError: an expert fails too often.
    """
    quieten()
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if root.exists():
        raise FileExistsError(f"{root} exists; choose another --root, or remove it to record again")
    size = world.image_size
    features = {
        CAMERA: {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
        "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
    }
    dropped = dict.fromkeys(world.tasks, 0)
    split, _ = splits(world.seed)
    total = episodes * len(world.tasks)
    with replace_folder(root) as fresh, progress_bar(total, "recording", unit="episode") as bar:
        dataset = LeRobotDataset.create(  # requires a folder that does not exist
            repo_id, fps=fps, features=features, root=fresh / "dataset", robot_type="metaworld", use_videos=True
        )
        for task in world.tasks:
            scene, index, kept = Scene(task, image_size=size), 0, 0
            while kept < episodes:
                episode = scene.record(split, index, max_steps=MAX_STEPS, after_success=AFTER_SUCCESS, frame_skip=1)
                if episode.success:
                    for row in _rows(world.see(episode.frames, split, index), episode, describe(task)):
                        dataset.add_frame(row)
                    dataset.save_episode()
                    kept += 1
                    bar.update()
                else:
                    dropped[task] += 1
                    if dropped[task] > 20 + 2 * kept:
                        raise RuntimeError(f"the expert of {task} failed in {dropped[task]} of {index + 1} episodes")
                index += 1
            scene.close()
        dataset.finalize()
        for path in list((fresh / "dataset").iterdir()):
            path.rename(fresh / path.name)
        (fresh / "dataset").rmdir()
        write_json(fresh / WORLD_FILE, dataclasses.asdict(world))
    return dropped


def _rows(frames: np.ndarray, episode: Any, task: str) -> list[dict[str, Any]]:
    return [
        {CAMERA: frame.transpose(1, 2, 0), "observation.state": state, "action": action, "task": task}
        for frame, state, action in zip(frames, episode.states, episode.actions, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    root: Path
    """Folder of the new dataset, which must not exist."""
    repo_id: str = "local/metaworld"
    """Name of the dataset; nothing is uploaded."""
    tasks: tuple[str, ...] = ("drawer-open",)
    """Meta-World tasks with a scripted expert."""
    episodes: int = 25
    """Solved episodes of each task."""
    seed: int = 0
    """Seed of start positions and distractors."""
    image_size: int = 64
    """Side of the frames in pixels."""
    distractors: bool = False
    """Random squares and light in every frame."""
    fps: int = 80
    """Frames per second of the time stamps; Meta-World makes 80 steps a second."""

    def __post_init__(self) -> None:
        if min(self.episodes, self.fps) < 1 or self.image_size < 32 or self.image_size % 2:
            raise ValueError("--episodes and --fps must be at least 1, --image-size even and at least 32")


def main() -> int:
    """Record; returns the exit status."""
    require("lerobot", "datasets", "av", "metaworld", "mujoco", "tyro")
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    begin = time.perf_counter()
    try:
        if settings.root.exists():  # before the search for OpenGL
            raise FileExistsError(f"{settings.root} exists; choose another --root, or remove it to record again")
        find_gl()
        world = World(settings.tasks, settings.image_size, settings.distractors, settings.seed)
        dropped = record(settings.root, settings.repo_id, world, settings.episodes, settings.fps)
    except (FileExistsError, GLMissing, RuntimeError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    failed = ", ".join(f"{task} {count}" for task, count in dropped.items())
    print(
        f"{settings.root}: {settings.episodes} solved episodes of each of {', '.join(settings.tasks)}; dropped, because "
        f"the expert failed: {failed}   ({time.perf_counter() - begin:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
