"""Proof by perturbation that the right token of the right sample is aligned; it needs no knowledge of the policy.

With the same random numbers, the last action step that counts is moved, and the positions of the first block's input that
change must be the aligned ones. Then samples are moved by the digits of their binary number: the runs in which a row
changes spell which sample it belongs to, so log2(B) forwards tell all rows apart.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from .binding import Binding, shared_turn
from .capture import hidden_states, join_runs, unwrapped_state
from .errors import HostOutputError, LaraError
from .hostcall import HostCall, host_loss
from .hostlog import each_message_once
from .tap import resolve_tap
from .tokens import TokenRule, action_steps, batch_keys, find_action

__all__ = ["Proof", "prove"]

_SEEDS = 3  # noise levels tried, since at some levels of some samples nothing is left of the action

Select = Callable[[torch.Tensor, HostCall, int], tuple[torch.Tensor, Any]]


@dataclass
class Proof:
    """What moving the actions of a batch showed.

    Attributes:
        token: "token 16 of 17: proven" (counted from 0, in the tapped sequence), or why not.
        rows: "proven (8 draws, tile)", or why not.
        problems: what is wrong, with the argument that fixes it.
        proven: whether token and rows are both proven.
    """

    token: str
    rows: str
    problems: list[str] = field(default_factory=list)
    proven: bool = False


class _Unproven(Exception):
    """Nothing can be said; the message is the reason."""


@dataclass
class _Observation:
    """One run of the host: the streams that the first block is given, the tapped state, the loss."""

    streams: dict[int | str, torch.Tensor]
    state: torch.Tensor
    loss: torch.Tensor | None


def prove(binding: Binding, rule: TokenRule, select: Select, call: HostCall, action: str | None = None) -> Proof:
    """Show on one batch which token of which sample is aligned.

    The policy must be in training mode; its weights and modes are not touched, random states are the caller's to restore.

    Args:
        binding: of an attached policy.
        rule: the token rule.
        select: (hidden state, call, B) -> the aligned vectors [r, B, D], as the adapter takes them.
        call: of the entry, with the frames taken out.
        action: batch key of the ground-truth action chunk; None: the row's, else "action" or "actions".
    """
    try:
        with each_message_once():
            return _prove(binding, rule, select, call, action)
    except _Unproven as reason:
        return Proof(f"not proven: {reason}", f"not proven: {reason}")


def _prove(binding: Binding, rule: TokenRule, select: Select, call: HostCall, key: str | None) -> Proof:
    found = find_action(call.batch, key or binding.spec.action)
    if found is None:
        wanted = key or binding.spec.action or "action or actions"
        raise _Unproven(
            f"the batch has no tensor under {wanted}; name the action chunk: lara.check(batch, action='...')"
        )
    key, chunk = found
    if not chunk.is_floating_point() or chunk.ndim < 2:
        raise _Unproven(f"{key} is {chunk.dtype} {list(chunk.shape)}, not a chunk of continuous actions")
    chunk = chunk if chunk.ndim == 3 else chunk[..., None]
    pairs, horizon = chunk.shape[:2]
    try:
        steps = action_steps(call.batch, binding.spec)
    except LaraError:  # with a callable token the shapes may be of any kind
        steps = None
    valid = chunk.new_ones(pairs, horizon, dtype=torch.bool) if steps is None else steps.valid.to(chunk.device)
    if list(valid.shape) != [pairs, horizon]:
        raise _Unproven(f"the padding is {list(valid.shape)}, but {key} has {pairs} samples of {horizon} steps")
    unread = _unread_padding(binding, call, key, [pairs, horizon]) if isinstance(rule, str) else []
    counted = valid.any(1)
    if not counted.any():
        raise _Unproven("every action step of the batch is padding")

    def watch(moved: torch.Tensor | None, seed: int) -> _Observation:
        """Run the host with the steps [B, T] moved by one, towards zero, so that no clipping undoes it."""
        values = chunk.clone()
        if moved is not None:
            values = torch.where(moved[..., None], values - torch.where(values > 0, 1.0, -1.0).to(values), values)
        return _observe(binding, call.with_entry(key, values.reshape(call.batch[key].shape)), pairs, seed)

    target = _target_step(valid, rule)
    base, reference = [watch(None, 0)], watch(None, 0)
    if not _same(base[0], reference):
        raise _Unproven("two runs with the same seeds differ; the policy draws from a generator of its own")
    one = watch(target, 0)
    seeds = [0]
    if not _reacts_everywhere(base[0], one, counted):
        base += [watch(None, seed) for seed in range(1, _SEEDS)]
        seeds = list(range(_SEEDS))
    after = [one, *(watch(target, seed) for seed in seeds[1:])]
    stream, problem = _stream(binding, key, base, after)
    if stream is None:
        return Proof("WRONG", "not proven", [problem])

    def changed(observed: list[_Observation]) -> torch.Tensor:
        return torch.stack([(a.streams[stream] != b.streams[stream]).any(-1) for a, b in zip(base, observed)]).any(0)

    at_step = changed(after)
    codes = torch.zeros(at_step.shape, dtype=torch.long, device=at_step.device)
    numbers = torch.arange(1, pairs + 1, device=chunk.device)
    for digit in range(_digits(pairs)):
        moved = valid & ((numbers >> digit) & 1).bool()[:, None]
        codes += changed([watch(moved, seed) for seed in seeds]).long() << digit
    aligned = _aligned_cells(select, base[0].state, call, pairs)
    proof = _judge(binding, rule, aligned, at_step.cpu(), codes.cpu(), counted.cpu(), target.cpu())
    return replace(proof, problems=[*proof.problems, *unread], proven=proof.proven and not unread)


def _unread_padding(binding: Binding, call: HostCall, action: str, shape: list[int]) -> list[str]:
    """Marks of the action's steps under keys that are not read: the last valid step may be another one."""
    read, found = batch_keys(binding.spec), []
    for key, value in call.batch.items():
        named = isinstance(key, str) and re.search(r"pad|action.*(mask|valid)|(mask|valid).*action", key)
        if not named or key in read or not isinstance(value, torch.Tensor) or list(value.shape[:2]) != shape:
            continue
        marks = value.flatten(2).any(-1) if value.ndim > 2 else value != 0
        if marks.any() and not marks.all():
            kind = "padding" if "pad" in key else "mask"
            found.append(
                f"{key!r} {list(value.shape)} marks some steps of {action!r} and is not read, so the last valid step may "
                f"be another one: attach_lara(spec=PolicySpec(..., {kind}={key!r}))"
            )
    return found


# ---------------------------------------------------------------------- runs of the host


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _observe(binding: Binding, call: HostCall, pairs: int, seed: int) -> _Observation:
    policy, spec = binding.policy, binding.spec
    first = resolve_tap(policy, 0, binding.tap.blocks, spec)
    inputs: list[dict[int | str, torch.Tensor]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = {**hidden_states(args), **hidden_states(kwargs)}
        inputs.append({name: unwrapped_state(state, first.path).detach() for name, state in found.items()})

    handle = policy.get_submodule(first.path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with _seeded(seed), torch.enable_grad():
            output, runs = binding.run_host(*binding.host_entry(), call)
    finally:
        handle.remove()
    if not runs:
        raise _Unproven("the tapped block did not run")
    times = binding.shared[1]
    state, kept = join_runs(runs, pairs=pairs, shared=binding.shared, spec=spec)
    passes = inputs[:: shared_turn(policy, first)[1]]
    if len(passes) * times != len(runs):
        raise _Unproven(f"the first block ran {len(inputs)} times, the tapped one {len(runs)} times")
    chosen = [passes[index // times] for index in kept]
    dim = 0 if spec.layout == "batch" else 1
    streams = {}
    for name in chosen[0]:
        parts = [part[name] for part in chosen if name in part]
        if len(parts) == len(chosen):
            streams[name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    try:
        loss: torch.Tensor | None = host_loss(output, spec.loss).detach().clone()
    except HostOutputError:
        loss = None
    return _Observation(streams, state.detach(), loss)


def _same(one: _Observation, two: _Observation) -> bool:
    return one.streams.keys() == two.streams.keys() and all(
        torch.equal(one.streams[name], two.streams[name]) for name in one.streams
    )


def _digits(pairs: int) -> int:
    """Binary digits of the samples' numbers; the same on every rank, since a forward may communicate (FSDP)."""
    digits = pairs.bit_length()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, digits)
        digits = max(everywhere)
    return digits


def _target_step(valid: torch.Tensor, rule: TokenRule) -> torch.Tensor:
    """The step [B, T] of each sample that the rule aligns: the last valid one, unless a fixed step is named."""
    horizon = valid.shape[1]
    index = (valid * torch.arange(horizon, device=valid.device)).amax(1)
    if rule == "last":
        index = torch.full_like(index, horizon - 1)
    elif isinstance(rule, int) and not isinstance(rule, bool) and -horizon <= rule < horizon:
        index = torch.full_like(index, rule % horizon)
    return valid & (torch.arange(horizon, device=valid.device) == index[:, None])


def _reacts_everywhere(base: _Observation, after: _Observation, counted: torch.Tensor) -> bool:
    for name, before in base.streams.items():
        changed = (before != after.streams[name]).any(-1)
        if max(int(changed.any(1).sum()), int(changed.any(0).sum())) >= int(counted.sum()):
            return True
    return False


def _stream(
    binding: Binding, key: str, base: list[_Observation], after: list[_Observation]
) -> tuple[int | str | None, str]:
    """The stream of the first block's input that the action enters and that the tapped state continues, or a problem."""
    blocks = binding.tap.blocks
    reacting = [
        name
        for name, before in base[0].streams.items()
        if any(not torch.equal(a.streams[name], b.streams[name]) for a, b in zip(base, after)) and before.ndim == 3
    ]
    if not reacting:
        losses = [(a.loss, b.loss) for a, b in zip(base, after)]
        if any(a is not None and b is not None and not torch.equal(a, b) for a, b in losses):
            return None, (
                f"the blocks at {blocks!r} do not see the action: moving it changes the loss, not their input. They are "
                "not the action head's; name those: blocks='...'"
            )
        return None, (
            f"moving {key!r} changes neither the loss nor the input of the blocks at {blocks!r}: the action chunk is under "
            "another key (attach_lara(spec=PolicySpec(..., action='...'))), or the blocks are another head's (blocks='...')"
        )
    state = base[0].state
    fitting = [name for name in reacting if base[0].streams[name].shape[:2] == state.shape[:2]]
    if fitting:
        alike = [n for n, stream in base[0].streams.items() if stream.shape == base[0].streams[fitting[0]].shape]
        if len(alike) > 1 and binding.spec.state is not None:
            raise _Unproven(
                f"the blocks have {len(alike)} streams of one shape, {alike}; try a batch with other lengths"
            )
        return fitting[0], ""
    entered = base[0].streams[reacting[0]]
    return None, (
        f"the action enters the blocks' stream {reacting[0]!r} {list(entered.shape)}, but the tapped state is another one, "
        f"{list(state.shape)}: say which of the returned states it is, attach_lara(spec=PolicySpec(..., state=...))"
    )


def _aligned_cells(select: Select, state: torch.Tensor, call: HostCall, pairs: int) -> list[torch.Tensor]:
    """For each sample, the cells [d0, d1] of the tapped state that its aligned vectors are made of."""
    with torch.enable_grad():
        leaf = state.detach().float().requires_grad_()
        vectors, _ = select(leaf, call, pairs)
        if not vectors.requires_grad:
            raise _Unproven("the token= callable does not take its vectors from the tapped state")
        cells = []
        for sample in range(pairs):
            (gradient,) = torch.autograd.grad(vectors[:, sample].sum(), leaf, retain_graph=True, allow_unused=True)
            cells.append(torch.zeros_like(leaf[..., 0]).bool() if gradient is None else (gradient != 0).any(-1))
    return [cell.cpu() for cell in cells]


# ---------------------------------------------------------------------- what it means


def _judge(
    binding: Binding,
    rule: TokenRule,
    aligned: list[torch.Tensor],
    at_step: torch.Tensor,
    codes: torch.Tensor,
    counted: torch.Tensor,
    target: torch.Tensor,
) -> Proof:
    """Compare the aligned cells with those that the action enters.

    Args:
        binding: for the names in messages.
        rule: the token rule; of a callable any action token is right, and another one is its choice.
        aligned: for each sample, the cells [d0, d1] of its aligned vectors.
        at_step: [d0, d1], cells that change with the target step.
        codes: [d0, d1], number of the sample (from 1) that a cell changes with; 0: with none.
        counted: [B], samples with an action.
        target: [B, T], the moved step.
    """
    pairs = len(aligned)
    samples = [sample for sample in range(pairs) if counted[sample]]
    axis = _batch_axis(codes, pairs, 0 if binding.spec.layout == "batch" else 1)
    if axis is None:
        raise _Unproven("samples of the batch influence each other's input to the blocks")
    length = at_step.shape[1 - axis]
    owner = codes.amax(1 - axis) - 1  # the sample of each row; -1: of none
    problems = []
    rows_wrong = [s for s in samples if _rows(aligned[s], axis) != [r for r, o in enumerate(owner.tolist()) if o == s]]
    draws = len(owner) // pairs
    if axis != (0 if binding.spec.layout == "batch" else 1) and not callable(rule):
        problems.append(
            f"the blocks work {'sequence' if axis else 'batch'}-first: samples are along dimension {axis} of the tapped "
            f"state; attach_lara(spec=PolicySpec(..., layout={'sequence' if axis else 'batch'!r}))"
        )
    elif rows_wrong:
        problems.append(_row_problem(owner.tolist(), pairs, rows_wrong[0], _rows(aligned[rows_wrong[0]], axis)))
    order = "" if draws == 1 else f" ({draws} draws, {_order(owner.tolist(), pairs) or 'in no regular order'})"
    rows = f"proven{order}" if not problems else "WRONG"

    positions = sorted({p for s in samples for p in _rows(aligned[s], 1 - axis)})
    token = f"{_span(positions)} of {length}"
    enters = codes > 0 if callable(rule) else at_step
    wrong = [sample for sample in samples if not (aligned[sample] & enters).any()]
    if wrong and callable(rule):
        return Proof(f"{token}: the choice of token=, not a valid action step", rows, problems)
    if wrong and not problems:
        row = [r for r, o in enumerate(owner.tolist()) if o == wrong[0]]
        entered = at_step.index_select(axis, torch.tensor(row)).any(axis).nonzero().flatten().tolist()
        problems.append(_token_problem(binding, wrong[0], target, entered, _rows(aligned[wrong[0]], 1 - axis), length))
    return Proof(f"{token}: {'WRONG' if wrong else 'proven'}", rows, problems, not problems)


def _batch_axis(codes: torch.Tensor, pairs: int, expected: int) -> int | None:
    """The dimension of `codes` along which the samples lie; `expected` if one sample does not tell; None: neither."""
    for axis in (expected, 1 - expected):
        highest = codes.amax(1 - axis, keepdim=True)
        regular = bool(((codes == 0) | (codes == highest)).all()) and bool((highest <= pairs).all())
        if regular and (pairs == 1 or len(highest.unique()) > 1):
            return axis
    return None


def _rows(cells: torch.Tensor, axis: int) -> list[int]:
    return cells.any(1 - axis).nonzero().flatten().tolist()


def _order(owner: list[int], pairs: int) -> str | None:
    repeats = len(owner) // pairs
    if owner == [row % pairs for row in range(len(owner))]:
        return "tile"
    if owner == [row // max(repeats, 1) for row in range(len(owner))]:
        return "interleave"
    return None


def _row_problem(owner: list[int], pairs: int, sample: int, rows: list[int]) -> str:
    true = [row for row, of in enumerate(owner) if of == sample]
    order = _order(owner, pairs)
    fix = (
        f"attach_lara(spec=PolicySpec(..., draws={order!r}))"
        if order and len(owner) > pairs
        else "a callable token(hidden, batch) -> [B, D] that puts them in the order of the batch"
    )
    return f"sample {sample} is aligned with rows {rows[:8]} of the tapped state, but its rows are {true[:8]}: {fix}"


def _token_problem(
    binding: Binding, sample: int, target: torch.Tensor, entered: list[int], aligned: list[int], length: int
) -> str:
    step, horizon = int(target[sample].long().argmax()), target.shape[1]
    if entered == [length - horizon + step]:
        fix = "attach_lara(spec=PolicySpec(..., action_tokens='last'))"
    elif entered == [step]:
        fix = "attach_lara(spec=PolicySpec(..., action_tokens='first'))"
    else:
        fix = "attach_lara(spec=PolicySpec(..., action_tokens=)) with their token id or a callable, or a callable token"
    return (
        f"action step {step} of sample {sample} enters the blocks at {_span(entered)} of {length}, but "
        f"{_span(aligned)} is aligned: {fix}"
    )


def _span(positions: list[int]) -> str:
    if not positions:
        return "no token"
    first, last = positions[0], positions[-1]
    return f"token {first}" if first == last else f"tokens {first} to {last}"
