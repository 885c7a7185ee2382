"""What a training step does, in counts: they are the same on a busy machine, and a test can hold them.

    python -m benchmarks.speed.counts                  # the tiny LAM and the demo's policy, by way
    python -m benchmarks.speed.counts --lam paper      # the paper's LAM, by part: a minute and 10 GB

An operation is a call of one of torch's kernels (on a GPU about one launch), views and metadata left out. Bytes are
those of the results that operations allocate. A synchronisation is a value that Python reads from a tensor: on a GPU
it waits there. FLOP are torch's own count, of matrix products, convolutions and attention alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Counts", "count"]

_MOVES = {"_to_copy", "copy_", "clone", "cat", "stack", "index", "index_select", "constant_pad_nd", "slice_backward",
          "select_backward", "index_put_", "_unsafe_index_put", "index_add_"}  # fmt: skip


class Counts(NamedTuple):
    """What some work did.

    operations: kernels called.
    moves: of these, those that only copy, cast or gather.
    allocated: bytes of the results that were allocated.
    synchronisations: values read by Python.
    flop: of matrix products, convolutions and attention.
    """

    operations: int
    moves: int
    allocated: int
    synchronisations: int
    flop: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.calls[name] += 1
        elif not func.is_view and not name.startswith(("sym_", "detach")):
            self.calls[name] += 1
            before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            fresh = {leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
                     for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}  # fmt: skip
            self.allocated += sum(size for storage, size in fresh.items() if storage not in before)
        return result


def count(work: Callable[[], Any]) -> tuple[Counts, Counter[str]]:
    """The counts of `work`, and how often each operation was called; it runs once, so warm up before."""
    with FlopCounterMode(display=False) as flop, _Recorder() as recorder:
        work()
    synchronisations = recorder.calls.pop("_local_scalar_dense", 0)
    moves = sum(number for name, number in recorder.calls.items() if name in _MOVES)
    counted = Counts(sum(recorder.calls.values()), moves, recorder.allocated, synchronisations, flop.get_total_flops())
    return counted, recorder.calls
