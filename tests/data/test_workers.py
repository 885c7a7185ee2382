"""Threads that end with the process, or with what they work for."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lara_adapter.data.workers import Workers

BUSY = """
import numpy as np, time
from lara_adapter.data.workers import Workers
workers = Workers(2, "busy")
def work():
    while True:
        np.convolve(np.ones(3000), np.ones(3000))
for _ in range(5):
    workers.submit(work)
time.sleep(0.2)
print("done")
"""


def wait_for(threads):
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(thread.is_alive() for thread in threads)


def of_name(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_jobs_are_done_and_errors_are_theirs():
    workers = Workers(2, "test-done")
    assert [workers.submit(lambda n=n: n * n) for n in range(5)][4].result(10) == 16
    with pytest.raises(ZeroDivisionError):
        workers.submit(lambda: 1 / 0).result(10)
    workers.close()
    workers.close()


def test_closing_interrupts_and_cancels():
    workers = Workers(1, "test-close")
    begun = threading.Event()

    def forever():
        begun.set()
        while True:
            time.sleep(0.01)

    running, waiting = workers.submit(forever), workers.submit(forever)
    threads = of_name("test-close")
    assert begun.wait(10)
    workers.close()
    assert waiting.cancelled()
    assert not any(thread.is_alive() for thread in threads)
    assert isinstance(running.exception(10), SystemExit)


def test_without_an_owner_they_end():
    workers = Workers(2, "test-owner")
    workers.submit(lambda: None).result(10)
    threads = of_name("test-owner")
    assert len(threads) == 2
    del workers
    gc.collect()
    assert wait_for(threads)


def test_a_process_ends_whatever_they_are_at():
    done = subprocess.run(
        [sys.executable, "-c", BUSY],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
