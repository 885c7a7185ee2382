"""Stages that survive being killed: each writes one folder, whole or not at all, named after its settings.

A folder that exists is finished, so a second run finds it and goes on with what is missing. Jobs of a stage run in
processes of their own, a few at a time. They are spawned, never forked: a fork after OpenGL was used hangs for ever.
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

_VERSION = 1  # raise it when a stage computes something else from the same settings
_RECORD = "stage.json"

Progress = Callable[[int], None]


class StageFailed(RuntimeError):
    """A job of a stage raised; the message holds its traceback."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One piece of a stage.

    Attributes:
        name: what it makes; with the hash of `settings` the name of its folder.
        function: a function of a module, called as `function(folder, progress, **settings)`. It writes its results into
            `folder` and calls `progress(n)` when n more units are done.
        settings: everything that the result depends on, as JSON can hold it. Other stages' folders belong here: their
            names carry the hash of their settings.
        units: how many units of progress it has.
    """

    name: str
    function: Callable[..., None]
    settings: Mapping[str, Any]
    units: int

    def folder(self, cache: Path) -> Path:
        """Where the result stands, once it is there."""
        # other stages' folders count relative to the cache, so that moving the output folder recomputes nothing
        text = json.dumps(
            [_VERSION, self.name, self.settings], sort_keys=True, default=lambda path: str(path.relative_to(cache))
        )
        return cache / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def took(self, cache: Path) -> dict[str, float]:
        """How long the job took when it ran: `seconds` by the clock, `cpu_seconds` of its own core."""
        return read_json(self.folder(cache) / _RECORD)


def _work(todo: Any, cache: Path, reports: Any) -> None:
    """Run jobs until none is left; the body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a half-written folder is removed
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)  # the other processes need the other cores
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
    """Run what is not there yet of the jobs, `workers` processes at a time, with one progress bar.

    Args:
        title: what the progress bar says.
        jobs: the jobs, the longest first.
        cache: folder of all results.
        workers: how many processes at a time.

    Returns:
        The folders of the results, in the order of `jobs`.

    Raises:
        StageFailed: a job raised, or its process died. What other jobs had finished is kept.
    """
    missing = [job for job in jobs if not job.folder(cache).is_dir()]
    total = sum(job.units for job in jobs)
    found = total - sum(job.units for job in missing)
    context = multiprocessing.get_context("spawn")
    todo, reports = context.Queue(), context.Queue()
    workers = min(workers, len(missing))
    for job in [*missing, *[None] * workers]:
        todo.put(job)
    # daemons: they end with us
    processes = [context.Process(target=_work, args=(todo, cache, reports), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    layout = "{desc:<20} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}  {elapsed}<{remaining}"
    pace = 0.5 if sys.stderr.isatty() else 5.0
    try:
        with tqdm(total=total, initial=found, desc=title, bar_format=layout, mininterval=pace) as bar:
            unfinished = len(missing)
            while unfinished:
                try:
                    kind, value = reports.get(timeout=1.0)
                except queue.Empty:
                    if not any(process.is_alive() for process in processes):
                        raise StageFailed(f"{title}: a process died without a word (out of memory?)") from None
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
