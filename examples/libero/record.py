"""Record demonstrations of LIBERO tasks, or video of play without actions, as a LeRobot dataset.

    python -m examples.libero.record --root data/object --suite libero_object --episodes 20
    python -m examples.libero.record --root data/play --suite libero_object --episodes 10 --play

The starts are random ones of LIBERO's, not those that it stores for evaluation. Only solved episodes are kept. A recording
that was stopped or killed goes on when the command is repeated; with more episodes or tasks it is extended.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from examples.libero.dataset import Episode, Recording
from examples.libero.expert import Expert
from examples.libero.play import Play
from examples.libero.scene import Scene
from examples.libero.starts import PlainLibero
from lara_adapter.errors import LaraError
from lara_adapter.evaluation import Observation

PLAY_NOISE, PLAY_SMOOTHNESS = 0.15, 0.9


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    root: Path
    """Folder of the dataset."""
    suite: Literal["libero_object", "libero_spatial"] = "libero_object"
    """Tasks that the expert masters."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Numbers of tasks in the suite."""
    episodes: int = 20
    """Episodes of each task, as many as there are in the end."""
    seed: int = 0
    """Chooses the starts; no two seeds share one."""
    size: int = 128
    """Side of both views in pixels: 128 as LIBERO's own demonstrations, or 256."""
    noise: float = 0.1
    """Standard deviation of noise on the hand's movement, of which 1 is 5 cm a step."""
    play: bool = False
    """Video of play instead of demonstrations; without a column of actions."""
    play_steps: int = 200
    """Length of an episode of play."""
    keep_actions: bool = False
    """Give play its column of actions, to measure what a latent action model has learned."""
    layout: Literal["v3.0", "v2.1"] = "v3.0"
    """Version of the format: v3.0 for LeRobot, v2.1 for GR00T N1.6 and openpi."""
    gripper: Literal["raw", "rlds"] = "raw"
    """Of the action's last number. raw: -1 opens, 1 closes, as in LeRobot's datasets; rlds: 1 opens, 0 closes."""
    quality: Literal["libero", "fast"] = "libero"
    """fast: without multi-sampling, shadows and reflections; half the time."""
    workers: int = 1
    """Processes, of 2.5 GB of memory each; the dataset is the same."""

    def __post_init__(self) -> None:
        if min(self.episodes, self.workers, self.play_steps) < 1 or self.size < 32 or self.size % 2:
            raise ValueError("--episodes, --workers and --play-steps: at least 1; --size: even and at least 32")
        if not 0 <= self.seed < 1000 or not set(self.tasks) <= set(range(10)):
            raise ValueError("--seed: 0 to 999; --tasks: 0 to 9")

    @property
    def actions(self) -> bool:
        """Whether the dataset has actions."""
        return self.keep_actions or not self.play

    def names(self) -> list[str]:
        """Names of the tasks."""
        names = PlainLibero(self.suite).tasks()
        return [names[number] for number in self.tasks]

    def content(self) -> dict[str, Any]:
        """What decides the content of an episode, besides its number."""
        names = ("suite", "seed", "play", "quality", "gripper", "play_steps" if self.play else "noise")
        return {name: getattr(self, name) for name in names}


class Stage:
    """Records episodes; the environment of one task is open at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._task, self._environment = settings, -1, None
        self.world = PlainLibero(settings.suite, settings.size, "raw", settings.quality, privileged=True)

    def record(self, task: int, number: int) -> Episode | None:
        """Record start `number` of a task; None: the expert failed."""
        settings = self._settings
        if self._environment is None or task != self._task:
            self.close()
            self._task, self._environment = task, self.world.open(self.world.tasks()[task])
        seed = 100_000 * settings.seed + number
        if settings.play:
            hand, steps = Play(PLAY_NOISE, PLAY_SMOOTHNESS, seed), settings.play_steps
        else:
            hand, steps = Expert(settings.noise, seed=seed), self._environment.max_steps
        self._environment.reset(seed)
        rows: list[tuple[Observation, np.ndarray]] = []
        for _ in range(steps):
            seen = self._environment.observe()
            action = hand.act(Scene(seen.states))
            rows.append((seen, action))
            if self._environment.step(action) and not settings.play:
                break
        else:
            if not settings.play:
                return None
        return to_episode(rows, settings)

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def to_episode(rows: list[tuple[Observation, np.ndarray]], settings: Settings) -> Episode:
    """What was seen and done, as the dataset stores it."""
    actions = np.stack([action for _, action in rows]).astype(np.float32)
    if settings.gripper == "rlds":
        actions[:, -1] = actions[:, -1] < 0
    return Episode(
        views={name: np.stack([seen.views[name] for seen, _ in rows]) for name in ("image", "wrist_image")},
        states=np.stack([seen.states["state"] for seen, _ in rows]),
        actions=actions if settings.actions else None,
        task="play" if settings.play else rows[0][0].instruction,
    )


_stage: Stage | None = None


def _job(settings: Settings, task: int, number: int) -> Episode | None:
    """:meth:`Stage.record`, in a process that keeps its stage."""
    global _stage
    if _stage is None:
        _stage = Stage(settings)
    return _stage.record(task, number)


def fill(
    recording: Recording, key: str, wanted: int, record: Callable[[Iterable[int]], Iterator[Episode | None]]
) -> Iterator[Episode | None]:
    """Record starts of a task until there are enough episodes.

    Args:
        recording: the dataset.
        key: name of the task.
        wanted: episodes.
        record: from numbers of starts to their episodes, in order.

    Yields:
        Each new episode once it is written, and None for a start that failed.

    Raises:
        RuntimeError: too many starts fail.
    """
    while (kept := recording.tried(key)[0]) < wanted:
        failed = recording.tried(key)[1]
        if failed > 10 + kept:
            raise RuntimeError(f"{key}: the expert failed at {failed} of {failed + kept} starts")
        numbers = range(kept + failed, failed + wanted)
        for number, episode in zip(numbers, record(numbers)):
            if episode is None:
                recording.fail(key)
            else:
                recording.add(key, episode, start=number)
            yield episode


def run(settings: Settings) -> Recording:
    """Record all that is missing; prints a line for each episode.

    Raises:
        LaraError: LIBERO or OpenGL is missing.
        RuntimeError, ValueError: see :func:`fill` and :class:`Recording`.
    """
    recording = Recording(settings.root, settings.layout, settings.size, settings.actions, settings.content())
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot render
    with recording, ProcessPoolExecutor(settings.workers, spawn) as pool:
        for task, name in zip(settings.tasks, settings.names(), strict=True):

            def record(numbers: Iterable[int], task: int = task) -> Iterator[Episode | None]:
                jobs = [pool.submit(_job, settings, task, number) for number in numbers]
                try:
                    for job in jobs:
                        yield job.result()
                finally:
                    for job in jobs:
                        job.cancel()

            begin = time.perf_counter()
            for episode in fill(recording, name, settings.episodes, record):
                count, failed = recording.tried(name)
                length = "failed" if episode is None else f"{len(episode.states)} steps"
                seconds = time.perf_counter() - begin
                progress = f"{count} of {settings.episodes}, {failed} failed; {length}, {seconds:.0f} s"
                print(f"{name}: {progress}", flush=True)
    return recording


def main() -> int:
    """Record; returns the exit status."""
    import tyro

    try:
        settings = tyro.cli(Settings, description=__doc__)
        recording = run(settings)
    except (LaraError, RuntimeError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 2
    frames = sum(entry["length"] for entry in recording.journal["episodes"])
    print(f"\n{settings.root}: {len(recording.journal['episodes'])} episodes, {frames} frames")
    if not settings.play:
        options = {name: getattr(settings, name) for name in ("suite", "gripper", "quality")}
        flags = " ".join(
            f"--setting {name}={value}" for name, value in {**options, "image_size": settings.size}.items()
        )
        print(f"evaluate a policy that learned from it with: lara eval all --simulator libero {flags}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
