"""Threads for work that nobody waits for at the end: to scan a long video may take an hour."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Workers"]

T = TypeVar("T")

_Jobs = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
_PATIENCE = 10.0  # seconds; a read from a disk that is gone may never return


class Workers:
    """Threads that do jobs in turn; at the end of the process, or of this object, they leave off what they are at.

    Args:
        count: how many threads.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        # concurrent.futures would wait for them at the end of the process
        threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"{name}-{number}", daemon=True)
            for number in range(max(1, count))
        ]
        for thread in threads:
            thread.start()
        # it runs at exit too, before the interpreter goes: a thread that is then in C++ would abort the process
        self._end = weakref.finalize(self, _end, self._jobs, threads)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Have a job done, after those before it."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """Cancel what was not begun, and interrupt the rest."""
        self._end()


def _work(jobs: _Jobs) -> None:
    with contextlib.suppress(SystemExit):  # of `_end`
        while (entry := jobs.get()) is not None:
            future, job = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # raised where the result is used
                future.set_exception(error)
            del future, job, entry  # they may refer to the owner of these threads


def _end(jobs: _Jobs, threads: Sequence[threading.Thread]) -> None:
    while True:
        try:
            entry = jobs.get_nowait()
        except queue.Empty:
            break
        if entry is not None:
            entry[0].cancel()
    others = [thread for thread in threads if thread is not threading.current_thread()]
    for thread in others:
        jobs.put(None)
        # raised between two of the thread's instructions: a scan ends after the frame that it decodes
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    for thread in others:
        thread.join(_PATIENCE)
