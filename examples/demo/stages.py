"""Stages that survive being killed: each job writes one folder, whole or not at all, named after its settings.

A folder that exists is finished, so a second run only computes what is missing. The jobs of a stage run in a few
processes. They are spawned, not forked: a fork after OpenGL was used hangs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lara_adapter.storage.files import read_json, replace_folder, write_json

_VERSION = 1  # increase it when a job computes something else from the same settings
_RECORD = "stage.json"

Progress = Callable[[int], None]


class StageFailed(RuntimeError):
    """A job failed; the message contains its traceback."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A unit of work of a stage.

    Attributes:
        name: with the hash of `settings` the name of its folder.
        function: a function of a module, called as `function(folder, progress, **settings)`. It writes its results into
            `folder` and calls `progress(n)` after n more units.
        settings: everything that the result depends on, JSON-serialisable; also the folders of other jobs, whose names
            carry the hash of their settings.
        units: number of units of progress.
    """

    name: str
    function: Callable[..., None]
    settings: Mapping[str, Any]
    units: int

    def folder(self, cache: Path) -> Path:
        """Folder of the result, which exists once the job is finished."""
        # paths relative to the cache, so that moving the output folder recomputes nothing
        text = json.dumps(
            [_VERSION, self.name, self.settings], sort_keys=True, default=lambda path: str(path.relative_to(cache))
        )
        return cache / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def timing(self, cache: Path) -> dict[str, float]:
        """Return how long the job ran: `seconds` of wall-clock time and `cpu_seconds`."""
        return read_json(self.folder(cache) / _RECORD)


def _work(todo: Any, cache: Path, reports: Any) -> None:
    """Run jobs until none is left; the target of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which terminates this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a half-written folder is removed
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)  # the other workers need the other cores
        while (job := todo.get()) is not None:
            begin, processor = time.perf_counter(), time.process_time()
            with replace_folder(job.folder(cache)) as fresh:
                job.function(fresh, lambda count: reports.put(("progress", count)), **job.settings)
                took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - processor}
                write_json(fresh / _RECORD, {key: round(value, 2) for key, value in took.items()})
            reports.put(("done", job.name))
    except BaseException:
        reports.put(("failed", traceback.format_exc()))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_jobs(title: str, jobs: Sequence[Job], cache: Path, workers: int) -> list[Path]:
    """Run the unfinished jobs in `workers` processes, with one progress bar.

    Args:
        title: of the progress bar.
        jobs: the jobs, the longest first.
        cache: folder of all results.
        workers: number of processes.

    Returns:
        The result folders, in the order of `jobs`.

    Raises:
        StageFailed: a job raised, or its process died. The results of finished jobs are kept.
    """
    missing = [job for job in jobs if not job.folder(cache).is_dir()]
    total = sum(job.units for job in jobs)
    finished = total - sum(job.units for job in missing)
    context = multiprocessing.get_context("spawn")
    todo, reports = context.Queue(), context.Queue()
    workers = min(workers, len(missing))
    for job in [*missing, *[None] * workers]:
        todo.put(job)
    # daemons: they end with this process
    processes = [context.Process(target=_work, args=(todo, cache, reports), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    layout = "{desc:<20} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}  {elapsed}<{remaining}"
    pace = 0.5 if sys.stderr.isatty() else 5.0
    try:
        with tqdm(total=total, initial=finished, desc=title, bar_format=layout, mininterval=pace) as bar:
            unfinished = len(missing)
            while unfinished:
                try:
                    kind, value = reports.get(timeout=1.0)
                except queue.Empty:
                    if not any(process.is_alive() for process in processes):
                        raise StageFailed(
                            f"{title}: a process died without an error message (out of memory?)"
                        ) from None
                    continue
                if kind == "progress":
                    bar.update(value)
                elif kind == "done":
                    unfinished -= 1
                else:
                    raise StageFailed(f"{title} failed:\n{value}")
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join(timeout=10)
    return [job.folder(cache) for job in jobs]
