"""Run a function on two gloo ranks of this machine, and collect what each returned.

The two processes are started once (importing torch takes longer than most tests) with one process group, which serves
every function until one fails.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, ClassVar

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

WORLD = 2
PATIENCE = 120  # seconds a function may take
PATIENCE_AFTER_FAILURE = 5  # seconds the other rank has to report, once one has raised


class RankError(Exception):
    """A rank raised."""


def _serve(rank: int, pipe: Any, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # The group is never destroyed: on a busy machine that blocks for ever in gloo now and then (torch 2.7), and a rank that
    # closes its sockets while the other still talks can make gloo abort that one. run_ranks kills both processes instead.
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE // 2))
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            torch.manual_seed(0)
            result = True, function(rank, *args)
        except Exception as error:  # the other rank may wait for this one: report, do not raise
            result = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        # plain bytes: torch's own way of sending tensors shares file descriptors and can wait for ever (torch 2.7)
        pipe.send_bytes(pickle.dumps(result))


class _Pool:
    processes: ClassVar[list[Any]] = []
    pipes: ClassVar[list[Any]] = []
    folder: ClassVar[tempfile.TemporaryDirectory[str] | None] = None  # of the group's store

    @classmethod
    def start(cls) -> None:
        if cls.processes and all(process.is_alive() for process in cls.processes):
            return
        cls.stop()
        context = mp.get_context("spawn")
        cls.folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, cls.folder.name), daemon=True)
            process.start()
            cls.processes.append(process)
            cls.pipes.append(ours)

    @classmethod
    def stop(cls) -> list[int | None]:
        """Kill the ranks; their exit codes, where they ended by themselves."""
        codes = [process.exitcode for process in cls.processes]
        for process in cls.processes:
            process.kill()
            process.join()
        if cls.folder is not None:
            cls.folder.cleanup()
        cls.processes, cls.pipes, cls.folder = [], [], None
        return codes


atexit.register(_Pool.stop)


def restart_ranks() -> None:
    """Have the next function run in fresh processes: DeepSpeed keeps process groups in globals of its modules."""
    _Pool.stop()


def run_ranks(function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
    """What `function(rank, *args)` returned on each rank.

    Raises:
        RankError: it raised somewhere, or took longer than `patience` seconds.
    """
    _Pool.start()
    results: dict[int, tuple[bool, Any]] = {}
    try:
        for pipe in _Pool.pipes:
            pipe.send((function, args))
        while len(results) < WORLD:
            waiting = [pipe for rank, pipe in enumerate(_Pool.pipes) if rank not in results]
            failed = any(not good for good, _ in results.values())
            ready = wait(waiting, timeout=PATIENCE_AFTER_FAILURE if failed else patience)
            if not ready and failed:
                break  # the other rank waits for the one that raised
            if not ready:
                raise RankError(f"{function.__name__} took longer than {patience:g} s on a rank")
            for pipe in ready:
                results[_Pool.pipes.index(pipe)] = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError, RankError) as error:
        codes = _Pool.stop()
        failures = "".join(f"\n{value}" for good, value in results.values() if not good)
        raise RankError(f"{function.__name__}: {type(error).__name__} {error}; exit codes {codes}{failures}") from error
    for good, value in results.values():
        if not good:
            _Pool.stop()  # a rank that failed in a collective leaves the other in an unknown state
            raise RankError(value)
    return [results[rank][1] for rank in range(WORLD)]
