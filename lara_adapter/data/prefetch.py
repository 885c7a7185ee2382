"""Decoding ahead: the next frames are made by a thread while the model works on the last ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

__all__ = ["prefetch"]

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items in their order, up to `depth` of them made ahead by a thread; its errors are raised here.

    The thread ends with this generator, however that ends: the source of the items may then be used again.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(1, depth))
    stop = threading.Event()

    def hand_over(kind: str, what: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, what), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not hand_over("item", item):
                    return
            hand_over("end", None)
        except BaseException as error:  # raised where the items are used
            hand_over("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, what = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise what
            yield what
    finally:
        stop.set()
        thread.join()
