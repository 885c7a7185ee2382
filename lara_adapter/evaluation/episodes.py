"""Which episodes to run, here or in several processes.

Processes are spawned: a simulator that renders does not survive a fork. What they have finished is in the folder of
episodes, so this process only looks there.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import LaraError
from .film import Film

if TYPE_CHECKING:
    from .rollout import Rollouts

__all__ = ["Episode", "WorkerDied", "run_episodes", "run_in_processes", "split"]

_POLL_S = 0.2


class WorkerDied(LaraError, RuntimeError):
    """A process of `lara eval --workers` was killed, perhaps for lack of memory."""


class Episode(NamedTuple):
    """An episode to run.

    Attributes:
        task: name of the task.
        seed: decides the start and the policy's noise.
        filmed: whether a video is written.
    """

    task: str
    seed: int
    filmed: bool


def run_episodes(
    rollouts: Rollouts, todo: Sequence[Episode], stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    """Run episodes in this process, those of a task in one environment; yields each with its result, which is saved."""
    for task, episodes in itertools.groupby(todo, key=lambda episode: episode.task):
        environment = rollouts.simulator.open(task)
        layout = None
        try:
            for episode in episodes:
                if stopped():
                    return
                film = Film(rollouts.store.video(task, episode.seed), environment.fps) if episode.filmed else None
                environment.reset(episode.seed)
                layout = layout or rollouts.layout(environment)
                result = rollouts.play(environment, episode.seed, layout, film)
                rollouts.store.keep(task, episode.seed, result)
                yield episode, result
        finally:
            environment.close()


def run_in_processes(
    rollouts: Rollouts, todo: Sequence[Episode], workers: int
) -> Iterator[tuple[Episode, dict[str, Any]]]:
    """Run episodes in spawned processes; yields each with its result, in the order in which they end.

    Raises:
        WorkerDied: a process was killed.
        LaraError: whatever a process raised first; the others stop after their present episode.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    parts = split(todo, workers)
    pool = ProcessPoolExecutor(min(workers, len(parts)), context, _begin, (rollouts, stop))
    try:
        futures = [pool.submit(_work, part) for part in parts]
        missing = list(todo)
        while missing:
            done, _ = wait(futures, _POLL_S, FIRST_EXCEPTION)
            for future in done:
                future.result()
            for episode in list(missing):
                result = rollouts.store.finished(episode.task, episode.seed)
                if result is not None:
                    missing.remove(episode)
                    yield episode, result
    except BrokenProcessPool as error:
        raise WorkerDied(
            f"one of {workers} workers was killed, perhaps for lack of memory: use fewer; finished episodes are kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def split(todo: Sequence[Episode], workers: int) -> list[list[Episode]]:
    """Parts of one task each, since opening a task is slow; tasks are cut only if there are fewer of them than workers."""
    tasks = [list(group) for _, group in itertools.groupby(todo, key=lambda episode: episode.task)]
    cuts = -(-workers // len(tasks))
    return [part for task in tasks for first in range(cuts) if (part := task[first::cuts])]


def _begin(rollouts: Rollouts, stop: Any) -> None:
    global _rollouts, _stop
    _rollouts, _stop = rollouts, stop


def _work(part: list[Episode]) -> None:
    for _ in run_episodes(_rollouts, part, _stop.is_set):
        pass


_rollouts: Rollouts
_stop: Any
