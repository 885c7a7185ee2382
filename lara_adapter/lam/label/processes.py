"""The processes that `accelerate launch` started, or this one alone."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ... import errors
from ...errors import LaraArgumentError
from ..sequence import choose_device

__all__ = ["Processes", "is_first", "open_processes"]

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=30)  # a process that is done waits for the slowest


class Processes:
    """One process, which shares its work with nobody.

    Attributes:
        index: of this process, from 0 on.
        count: how many there are.
        device: where its model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.index, self.count, self.device = 0, 1, device

    def each(self, work: Callable[[], T]) -> T:
        """Do the work in every process; an error in one is raised in all, once all have come here."""
        return work()

    def first(self, work: Callable[[], T]) -> T:
        """Do the work in the first process, and have its result or its error in all."""
        return work()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all."""
        return [value]


class _Launched(Processes):
    def __init__(self, device: torch.device, index: int, count: int) -> None:
        self.index, self.count, self.device = index, count, device

    def each(self, work: Callable[[], T]) -> T:
        result, error = _attempt(work)
        self._raise(error, self.gather(_described(error)))
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], T]) -> T:
        from accelerate.utils import broadcast_object_list

        result, error = _attempt(work) if self.index == 0 else (None, None)
        shared = [result, _described(error)]
        broadcast_object_list(shared)
        self._raise(error, [shared[1]])
        return shared[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        from accelerate.utils import gather_object

        found: list[T] = gather_object([value])
        return found

    def _raise(self, own: Exception | None, failures: list[Any]) -> None:
        if own is not None:
            raise own
        for index, failure in enumerate(failures):
            if failure is not None:
                kind, message = failure
                known = getattr(errors, kind, None) if kind in errors.__all__ else None
                raise (known or RuntimeError)(f"process {index}: {'' if known else f'{kind}: '}{message}")


def is_first() -> bool:
    """Whether this is the only process, or the first of those that were launched together."""
    return not _launched() or int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def open_processes(device: str) -> Iterator[Processes]:
    """The processes that were launched together; each comes here.

    Args:
        device: "auto" (the GPU of each process, if there is one), "cpu", "cuda", ...

    Raises:
        LaraArgumentError: there is no such device, or processes were launched without accelerate installed.
    """
    if not _launched():
        yield Processes(choose_device(device))
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise LaraArgumentError(
            f"several processes were launched, which needs accelerate ({error}): pip install 'lara-adapter[train]'"
        ) from error
    ours = not torch.distributed.is_initialized()
    # the GPUs of processes on the CPU stay untouched
    state = PartialState(cpu=device == "cpu", **({"timeout": _PATIENCE} if ours else {}))
    place = state.device if device == "auto" else choose_device(device)
    yield _Launched(place, state.process_index, state.num_processes)
    if ours:
        state.wait_for_everyone()
        state.destroy_process_group()


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _described(error: Exception | None) -> tuple[str, str] | None:
    return None if error is None else (type(error).__name__, str(error))
