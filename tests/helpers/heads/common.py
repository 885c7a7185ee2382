"""What all heads share: their description, their batches, and the truth about them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

HORIZON, ACTION, SIZE = 8, 7, 32
FRAMES = "lara_frames"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A policy of somebody else, built tiny, and what perturbation says of it.

    Attributes:
        policy: the policy in train mode, without LARA.
        make_batch: (batch size, seed) -> what the entry takes, without frames: its first argument, or its keyword
            arguments if `keywords`.
        source: repository and commit.
        entry: method that training calls, as a dotted path.
        blocks: dotted path of the action head's blocks.
        length: tokens in their sequence.
        token: position of the last action step; one for each sample where they differ.
        draws: noise draws of each sample, always tiled; 1: none.
        action: batch key of the actions.
        frames: batch key of the frames.
        keywords: whether training calls the entry by keywords.
        more: further positional arguments of the entry.
        stand_in: what is not the real code; "": all of it is.
        padding: batch key of the padded steps, if the host has one.
        sample: (policy) -> actions.
        optimizer: (policy) -> the optimizer that the host's own code makes; None: of all parameters.
    """

    policy: nn.Module
    make_batch: Callable[[int, int], Any]
    source: str
    blocks: str
    length: int
    token: int | tuple[int, ...]
    sample: Callable[[nn.Module], torch.Tensor]
    entry: str = "forward"
    draws: int = 1
    action: str = "action"
    frames: str = FRAMES
    keywords: bool = False
    more: tuple[Any, ...] = ()
    stand_in: str = ""
    padding: str | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None

    def batch(self, size: int = 3, seed: int = 0) -> Any:
        """A batch without frames."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make_batch(size, seed)

    def call(self, policy: nn.Module, batch: Any, seed: int = 0) -> Any:
        """What the training loop does with a batch."""
        path, _, method = self.entry.rpartition(".")
        entry = policy if self.entry == "forward" else getattr(policy.get_submodule(path), method)
        torch.manual_seed(seed)
        return entry(**batch) if self.keywords else entry(batch, *self.more)

    def token_of(self, sample: int) -> int:
        return self.token if isinstance(self.token, int) else self.token[sample]

    def rows_of(self, sample: int, size: int) -> list[int]:
        """Rows of the head that belong to a sample."""
        return [draw * size + sample for draw in range(self.draws)]


def calvin_scope(size: int, images: int) -> dict[str, Any]:
    """One scope of a CALVIN batch: two cameras with some images each, instructions of three words, actions."""
    texts = ("push the block", "open the drawer", "close it now")
    return {
        "rgb_obs": {name: torch.rand(size, images, 3, 16, 16) for name in ("rgb_static", "rgb_gripper")},
        "lang_text": [texts[index % 3] for index in range(size)],
        "actions": torch.randn(size, HORIZON, ACTION),
    }


def parts(batch: Any) -> Iterator[dict[str, Any]]:
    """The mappings that hold the samples: the batch, its scopes, or the samples themselves."""
    if isinstance(batch, list):
        yield from batch
    elif all(isinstance(value, dict) for value in batch.values()):
        yield from batch.values()
    else:
        yield batch


def actions_of(batch: Any, key: str) -> list[Any]:
    """The ground truth [T, A] of each sample, to be changed in place."""
    if isinstance(batch, list):
        return [sample[key] for sample in batch]
    return [row for part in parts(batch) for row in part[key]]


def with_frames(batch: Any, head: Head, valid: list[bool] | None = None) -> Any:
    """A copy of the batch with a pair of frames for each sample, and flags if they are given."""
    batch, start = copy.deepcopy(batch), 0
    generator = torch.Generator().manual_seed(7)
    size = len(actions_of(batch, head.action))
    frames = torch.randint(0, 256, (size, 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    for part in parts(batch):
        one = isinstance(batch, list)
        rows = slice(start, start + (1 if one else len(part[head.action])))
        part[head.frames] = frames[start] if one else frames[rows]
        if valid is not None:
            part[f"{head.frames}_valid"] = torch.tensor(valid[start]) if one else torch.tensor(valid[rows])
        start = rows.stop
    return batch


class Recorder:
    """Every state that a module takes ("input") or returns ("output") in one call of the policy."""

    def __init__(self, module: nn.Module, what: str) -> None:
        self.states: list[torch.Tensor] = []
        if what == "output":
            self.handle = module.register_forward_hook(lambda m, args, output: self.states.append(first(output)))
        else:
            self.handle = module.register_forward_pre_hook(
                lambda m, args, kwargs: self.states.append(first((*args, *kwargs.values()))), with_kwargs=True
            )

    def __enter__(self) -> list[torch.Tensor]:
        return self.states

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def first(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else next(v for v in value if isinstance(v, torch.Tensor))


def changes(head: Head, policy: nn.Module, change: Callable[[list[Any]], None], size: int = 3) -> torch.Tensor:
    """Which [row, position] of the first block's input a change of the actions moves; the runs are joined."""
    states = []
    for changed in (False, True):
        batch = head.batch(size)
        if changed:
            change(actions_of(batch, head.action))
        with Recorder(policy.get_submodule(head.blocks)[0], "input") as seen, torch.no_grad():
            head.call(policy, batch)
        states.append(torch.cat(seen))
    return states[0].ne(states[1]).any(-1)


def move(action: Any) -> None:
    """Another action, in place."""
    action += np.float32(0.5) if isinstance(action, np.ndarray) else 0.5
