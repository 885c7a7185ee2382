"""The hidden state of one call: which of a block's tensors it is, and which of the blocks' runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .errors import TokenError
from .policies import PolicySpec

__all__ = ["hidden_states", "input_state", "join_runs", "pick_state", "unwrapped_state"]


def hidden_states(value: Any) -> dict[int | str, torch.Tensor]:
    """The floating [*, *, D] tensors in what a block takes or returns, by their index or key."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif dataclasses.is_dataclass(value):
        items = list(vars(value).items())
    else:
        items = [(0, value)]
    return {
        key: item
        for key, item in items
        if isinstance(item, torch.Tensor) and item.ndim == 3 and item.is_floating_point()
    }


def pick_state(value: Any, state: int | str | None, path: str, width: int | None = None) -> torch.Tensor | None:
    """The hidden state in what a block returns.

    Args:
        value: a tensor, or a tuple, list, mapping or dataclass with one.
        state: index or key of the state, where there are several; None: there is one.
        path: of the block, for messages.
        width: of the state as far as the block tells; attention weights beside it have another one.

    Returns:
        The state; None if there is no tensor.

    Raises:
        TokenError: `state` is not there, or there are several states and `state` is None.
    """
    if isinstance(value, torch.Tensor):
        return value
    if state is not None:
        if isinstance(state, str) and dataclasses.is_dataclass(value):
            picked = getattr(value, state, None)
        else:
            try:
                picked = value[state]
            except (KeyError, IndexError, TypeError):
                picked = None
        if not isinstance(picked, torch.Tensor):
            known = {key: list(item.shape) for key, item in hidden_states(value).items()}
            raise TokenError(f"{path!r} has no hidden state {state!r}; it has {known}")
        return picked
    states = hidden_states(value)
    of_width = [item for item in states.values() if item.shape[-1] == width]
    if len(states) > 1 and len(of_width) == 1:
        return of_width[0]
    if len(states) > 1:
        shapes = ", ".join(f"{key!r}: {list(item.shape)}" for key, item in states.items())
        raise TokenError(
            f"{path!r} has {len(states)} hidden states ({shapes}), as two-stream blocks do: say which one holds the "
            f"action tokens, attach_lara(spec=PolicySpec(..., state={list(states)[-1]!r}))"
        )
    if states:
        return next(iter(states.values()))
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((item for item in items if isinstance(item, torch.Tensor)), None)


def input_state(args: tuple[Any, ...], kwargs: Mapping[str, Any], state: int | str | None, path: str) -> Any:
    """The hidden state that a block or norm is given: `state` if it names a keyword, else the first positional tensor, else
    `hidden_states`, else the only one among the keywords.

    Raises:
        TokenError: it is not clear which keyword holds it.
    """
    if isinstance(state, str) and isinstance(kwargs.get(state), torch.Tensor):
        return kwargs[state]
    for value in args:
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    return pick_state(dict(kwargs), None, path)


def unwrapped_state(state: torch.Tensor, path: str) -> torch.Tensor:
    """The tensor under torch.func's wrappers: a state inside `torch.func.jvp` keeps its graph to the weights.

    Raises:
        TokenError: the blocks run under `torch.func.vmap`, which hides the batch.
    """
    if torch.compiler.is_compiling():  # after a graph break this may be a frame of its own
        return state
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(state):
        if functorch.is_batchedtensor(state):
            raise TokenError(f"{path!r} runs under torch.func.vmap, where LARA cannot tell the samples apart")
        state = functorch.get_unwrapped(state)
    return state


def join_runs(
    runs: tuple[torch.Tensor, ...], *, pairs: int, shared: tuple[int, int], spec: PolicySpec
) -> tuple[torch.Tensor, list[int]]:
    """The hidden state of one call in which the blocks ran once or several times.

    Of a block that stands k times in a list of blocks (shared weights), the run of the tapped layer counts. Of the rest:
    the run that `spec.run` names, else the one that carries a graph, else all of them, joined where they add up to the
    samples of the batch, or to several noise draws of them (`spec.draws`).

    Args:
        runs: the states, in the order in which they passed the tap.
        pairs: B, the number of pairs of frames.
        shared: which of the k places of the block is meant, and k; (0, 1) for a block of its own.
        spec: row of the policy table.

    Returns:
        The state, and the indices in `runs` of its parts.

    Raises:
        TokenError: it is not clear which run is meant; the message says how often the blocks ran, with how many rows.
    """
    turn, times = shared
    dim = 0 if spec.layout == "batch" else 1
    rows = [run.shape[dim] if run.ndim > dim else 0 for run in runs]
    ran = f"the blocks ran {len(runs)} times in one call with rows {rows}"
    kept = list(range(len(runs)))
    if times > 1:
        if len(runs) % times:
            raise TokenError(f"{ran}, but the tapped block stands {times} times in the list of blocks")
        kept = kept[turn::times]
    if spec.run is not None:
        if not -len(kept) <= spec.run < len(kept):
            raise TokenError(f"{ran}: there is no run={spec.run} (PolicySpec)")
        kept = [kept[spec.run]]
    if len(kept) > 1:
        kept = [index for index in kept if runs[index].requires_grad] or kept
    if len(kept) == 1:
        return runs[kept[0]], kept
    parts = [runs[index] for index in kept]
    alike = len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) == 1
    total = sum(rows[index] for index in kept)
    # runs of all samples are one noise draw each; only tiling stacks them in that order
    in_draws = spec.draws == "tile" or (spec.draws == "interleave" and any(rows[index] != pairs for index in kept))
    if alike and (total == pairs or (in_draws and total % pairs == 0)):
        return torch.cat(parts, dim), kept
    raise TokenError(
        f"{ran}, but the batch has {pairs} pairs of frames. Say which run is aligned: "
        "attach_lara(spec=PolicySpec(..., run=0)) is the first, run=-1 the last; or draws='tile' if each run is another "
        "noise draw of the same samples"
    )
