"""Jobs for test_stages.py, in a module of their own so that spawned processes can import them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


def write(
    folder: Path,
    progress: Callable[[int], None],
    *,
    log: str,
    text: str,
    wait: float = 0,
    pid: str = "",
    extra: int = 0,
) -> None:
    progress(1)
    if pid:
        Path(pid).with_suffix(".new").write_text(str(os.getpid()))
        Path(pid).with_suffix(".new").rename(pid)
    time.sleep(wait)
    (folder / "result").write_text(text)
    with open(log, "a") as file:
        file.write(f"{text}\n")
    progress(1)


def fail(folder: Path, progress: Callable[[int], None]) -> None:
    (folder / "half").write_text("half")
    raise ValueError("this job always fails")


def die(folder: Path, progress: Callable[[int], None]) -> None:
    os._exit(9)
