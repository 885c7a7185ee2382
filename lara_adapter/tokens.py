"""Which token of the tapped hidden state is aligned: the last action step that is not padding, by default.

The paper reads the token of the last timestep of the action chunk. Hosts that pad every embodiment to the model's
horizon keep padding there, so `sequence[:, -1]` is right only for hosts that do not pad.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .errors import LaraArgumentError, TokenError
from .policies import GENERIC, PolicySpec

__all__ = ["ActionSteps", "TokenRule", "action_steps", "batch_keys", "check_rule", "find_action", "select_rows",
           "select_token", "token_positions"]  # fmt: skip

logger = logging.getLogger(__name__)

TokenRule = str | int | Callable[[torch.Tensor, Any], torch.Tensor]

NAMED_RULES = ("last_valid", "mean_valid", "last")

# batch keys with the length of the action chunk and its padding; the first one present is used
MASK_KEY, PADDING_KEY, ACTION_KEYS = "action_mask", "action_is_pad", ("action", "actions")


class ActionSteps(NamedTuple):
    """The action steps of a batch: `valid` [B, T] bool, True where a step is not padding."""

    valid: torch.Tensor


def check_rule(rule: TokenRule) -> None:
    """Refuse what is not a token rule.

    Raises:
        LaraArgumentError: neither one of "last_valid", "mean_valid", "last", nor an int, nor callable.
    """
    if rule in NAMED_RULES or callable(rule) or (isinstance(rule, int) and not isinstance(rule, bool)):
        return
    raise LaraArgumentError(
        f"attach_lara: token={rule!r}, but one of {', '.join(map(repr, NAMED_RULES))}, an integer step of the action "
        "chunk, or a callable(hidden [R, S, D], batch) -> [R, D] is expected"
    )


def find_action(batch: Mapping[str, Any], key: str | None = None) -> tuple[str, torch.Tensor] | None:
    """The ground-truth action chunk of a batch with its key: `key`, else "action" or "actions"; None if it has none."""
    for name in (key,) if key else ACTION_KEYS:
        action = batch.get(name)
        if isinstance(action, torch.Tensor):
            return name, action
    return None


def batch_keys(spec: PolicySpec) -> tuple[str, ...]:
    """The batch keys that :func:`action_steps` and :func:`token_positions` look up."""
    actions = (spec.action,) if spec.action else ACTION_KEYS
    ids = () if spec.action_tokens in ("last", "first") else ("input_ids", *_named(spec.action_tokens))
    return (*actions, spec.mask or MASK_KEY, spec.padding or PADDING_KEY, *ids)


def _named(where: Any) -> tuple[str, ...]:
    return (where,) if isinstance(where, str) else ()


def action_steps(batch: Mapping[str, Any], spec: PolicySpec = GENERIC) -> ActionSteps | None:
    """Read T and the padding from a batch.

    Looks for `action_mask` (nonzero = valid), then `action_is_pad` (True = padding), then `action` or `actions`
    [B, T, A] (nothing padded), or for the keys that the row names. A mask is compared with the action: [B, T] and
    [B, T, A] are over steps; [B, 1, A], [B, A] and [A] are over the dimensions of every step. None if the batch has none.

    Raises:
        TokenError: one of them has another shape.
    """
    found = find_action(batch, spec.action)
    shape = None
    if found is not None:
        name, action = found
        shape = list(action.shape)
    mask_key, padding_key = spec.mask or MASK_KEY, spec.padding or PADDING_KEY
    key = mask_key if isinstance(batch.get(mask_key), torch.Tensor) else padding_key
    marks = batch.get(key)
    if isinstance(marks, torch.Tensor):
        if shape is not None and len(shape) == 3:
            valid = _over_steps(key, ~marks.bool() if key == padding_key else marks != 0, name, shape)
        elif key == padding_key and marks.ndim != 2:
            raise TokenError(f"{key} has shape {list(marks.shape)}, but [B, T] is expected")
        elif marks.ndim not in (2, 3):
            raise TokenError(f"{key} has shape {list(marks.shape)}, but [B, T] or [B, T, A] is expected")
        elif marks.ndim == 3 and marks.shape[1] == 1 and found is None:
            raise TokenError(
                f"{key} has shape {list(marks.shape)}, which is over dimensions or over one step, and the batch has no "
                "action to compare it with; name its key: attach_lara(spec=PolicySpec(..., action='...'))"
            )
        else:
            valid = ~marks.bool() if key == padding_key else marks != 0
            valid = valid.any(-1) if valid.ndim == 3 else valid
        return ActionSteps(valid)
    if shape is None:
        return None
    if len(shape) != 3:
        raise TokenError(
            f"{name} has shape {shape}, but [B, T, A] is expected; if it is not the action chunk, name that: "
            "attach_lara(spec=PolicySpec(..., action='...')), or pass a callable token(hidden, batch)"
        )
    return ActionSteps(torch.ones(shape[:2], dtype=torch.bool, device=action.device))


def _over_steps(key: str, marks: torch.Tensor, action_key: str, shape: list[int]) -> torch.Tensor:
    """The valid steps [B, T], from flags that are compared with an action of `shape` [B, T, A]."""
    batch, steps, width = shape
    got = list(marks.shape)
    if got == [batch, steps]:
        return marks
    if got in ([batch, steps, width], [batch, steps, 1]):
        return marks.any(-1)
    if got in ([batch, 1, width], [batch, width], [1, 1, width], [1, width], [width]):  # over dimensions, as RDT's
        return marks.any(-1).reshape(-1, 1).expand(batch, steps)
    raise TokenError(
        f"{key} has shape {got}, but {action_key} has {shape}: [B, T] or [B, T, A] over the action's steps is expected, or "
        "[B, 1, A] over its dimensions; name other keys with attach_lara(spec=PolicySpec(..., action=, mask=, padding=))"
    )


def token_positions(batch: Mapping[str, Any], where: Any) -> torch.Tensor | None:
    """Where the action tokens are inside a longer sequence, bool [B, S]; None for "last" and "first".

    Args:
        batch: the entries of the batch.
        where: `PolicySpec.action_tokens`.

    Raises:
        TokenError: the batch lacks `input_ids` or the token's id, or a callable returned something else.
    """
    if isinstance(where, str) and where in ("last", "first"):
        return None
    if callable(where):
        found = where(batch)
        if not isinstance(found, torch.Tensor) or found.dtype != torch.bool or found.ndim != 2:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise TokenError(f"PolicySpec.action_tokens callable returned {got}, but bool [B, S] is expected")
        return found
    ids, token = batch.get("input_ids"), where if isinstance(where, int) else batch.get(where)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or token is None:
        missing = "input_ids [B, S]" if not isinstance(ids, torch.Tensor) or ids.ndim != 2 else repr(where)
        raise TokenError(
            f"the action tokens are where input_ids equals {where!r}, but the batch has no {missing}; it has "
            f"{sorted(map(str, batch))[:20]}"
        )
    if isinstance(token, torch.Tensor) and token.ndim:
        token = token.flatten()[0]  # one id, collated
    return ids == token


def select_token(
    hidden: torch.Tensor,
    steps: ActionSteps | None,
    rule: TokenRule,
    where: Any,
    batch: Any,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The aligned vector of each row.

    Args:
        hidden: [R, S, D], the tapped state; R = r * B rows, in the order of `steps` already.
        steps: the action steps of the R rows; None: unknown.
        rule: see :func:`check_rule`. An integer counts the steps of the action chunk, negative from its end.
        where: "last" or "first": which T of the S positions are action tokens.
        batch: what a callable rule receives besides `hidden`, which it gets as the block returned it.
        positions: [R, S] bool, the action tokens of each row, instead of `where`; see :func:`token_positions`.

    Returns:
        The vectors [R, D], and [R] bool, True where the row has at least one valid step (None: all have).

    Raises:
        TokenError: the state has another shape than [R, S, D], S < T, or the rule needs T and it is unknown.
    """
    if callable(rule):
        token = rule(hidden, batch)
        if not isinstance(token, torch.Tensor) or token.ndim != 2:
            got = list(token.shape) if isinstance(token, torch.Tensor) else type(token).__name__
            raise TokenError(f"token= callable returned {got}, but [{hidden.shape[0]}, {hidden.shape[-1]}] is expected")
        return token, None
    if hidden.ndim != 3:
        raise TokenError(
            f"the tapped hidden state has shape {list(hidden.shape)}, but [B, sequence, width] is expected"
        )
    if positions is not None:
        return _at_positions(hidden, steps, rule, positions)
    if steps is None:
        return _without_steps(hidden, rule, where), None
    rows, length, _ = hidden.shape
    horizon = steps.valid.shape[1]
    if steps.valid.shape[0] != rows or horizon > length:
        raise TokenError(
            f"the tapped hidden state has {rows} rows of {length} tokens, but the batch has "
            f"{steps.valid.shape[0]} rows of {horizon} action steps"
        )
    start = length - horizon if where == "last" else 0
    return _by_rule(hidden[:, start : start + horizon], steps.valid.to(hidden.device), rule)


def _at_positions(
    hidden: torch.Tensor, steps: ActionSteps | None, rule: TokenRule, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`select_token` for action tokens inside a longer sequence; a row without any does not count."""
    if list(positions.shape) != list(hidden.shape[:2]):
        raise TokenError(
            f"the action tokens are located in {list(positions.shape)} positions, but the tapped hidden state has "
            f"{list(hidden.shape[:2])}"
        )
    positions = positions.to(hidden.device)
    count = positions.sum(1, keepdim=True)
    horizon = hidden.shape[1] if steps is None else steps.valid.shape[1]
    index = positions.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :horizon]
    actions = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
    valid = torch.arange(index.shape[1], device=hidden.device) < count
    if steps is not None:
        valid = valid & steps.valid.to(hidden.device)[:, : index.shape[1]]
    if not isinstance(rule, str) or rule == "last":
        step = -1 if rule == "last" else int(rule)  # type: ignore[arg-type]
        at = (count + step if step < 0 else torch.full_like(count, step)).clamp(0, index.shape[1] - 1)
        return actions[torch.arange(len(hidden), device=hidden.device), at[:, 0]], valid.gather(1, at)[:, 0]
    return _by_rule(actions, valid, rule)


def _by_rule(actions: torch.Tensor, valid: torch.Tensor, rule: TokenRule) -> tuple[torch.Tensor, torch.Tensor]:
    """The vector [R, D] of the action tokens [R, T, D] that the rule names, and whether the row counts."""
    rows, horizon, _ = actions.shape
    any_valid = valid.any(1)
    if rule == "mean_valid":
        weight = valid.to(actions.dtype)
        mean = (actions * weight[..., None]).sum(1) / weight.sum(1).clamp_min(1)[:, None]
        return mean, any_valid
    if rule == "last_valid":
        index = (valid * torch.arange(horizon, device=actions.device)).amax(1)
    else:
        step = -1 if rule == "last" else int(rule)  # type: ignore[arg-type]
        if not -horizon <= step < horizon:
            raise TokenError(f"token={step}, but the action chunk has {horizon} steps; use {-horizon}..{horizon - 1}")
        index = torch.full((rows,), step % horizon, device=actions.device)
        # a fixed step may be padding in some rows: those rows do not count
        any_valid = valid.gather(1, index[:, None]).squeeze(1)
    return actions[torch.arange(rows, device=actions.device), index], any_valid


def select_rows(
    hidden: torch.Tensor,
    steps: ActionSteps | None,
    rule: TokenRule,
    *,
    pairs: int,
    width: int | None,
    where: Any,
    draws: str | None,
    batch: Any,
    positions: torch.Tensor | None = None,
    layout: str = "batch",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The aligned vectors of a batch, sorted by noise draw.

    Args:
        hidden: [r * B, S, D], the tapped state of r noise draws of each sample.
        steps: the action steps of the B samples (or of all rows), or None.
        rule: see :func:`check_rule`.
        pairs: B, the number of pairs of frames.
        width: D as expected, or None if unknown.
        where: "last" or "first".
        draws: "tile" (row j * B + i is sample i), "interleave" (row i * r + j), or None: r must be 1.
        batch: what a callable rule receives.
        positions: [B, S] (or of all rows) bool, see :func:`select_token`.
        layout: "sequence": `hidden` is [S, r * B, D]; a callable rule gets it so.

    Returns:
        [r, B, D], and [r, B] bool or None, as :func:`select_token`.

    Raises:
        TokenError: rows or width do not fit, or see :func:`select_token`.
    """
    if callable(rule):  # what it returns is not second-guessed, only counted
        vectors, counts = select_token(hidden, None, rule, where, batch)
        rows = len(vectors)
    else:
        hidden = hidden.transpose(0, 1) if layout == "sequence" and hidden.ndim == 3 else hidden
        rows = hidden.shape[0]
    repeats = rows // pairs if rows % pairs == 0 else 0
    if repeats == 0 or (repeats > 1 and draws is None):
        what = "the token= callable returned" if callable(rule) else "the tapped hidden state has"
        raise TokenError(
            f"{what} {rows} rows, but the batch has {pairs} pairs of frames. Every sample needs one; if this policy "
            "repeats each sample for several noise draws, say how: PolicySpec(draws='tile' or 'interleave'); if its "
            "blocks work sequence-first, [S, B, D]: PolicySpec(layout='sequence')"
        )
    tiled = draws != "interleave"
    if not callable(rule):

        def of_all_rows(marks: torch.Tensor) -> torch.Tensor:
            if repeats == 1 or len(marks) != pairs:
                return marks
            return marks.repeat(repeats, 1) if tiled else marks.repeat_interleave(repeats, 0)

        steps = None if steps is None else ActionSteps(of_all_rows(steps.valid))
        positions = None if positions is None else of_all_rows(positions)
        vectors, counts = select_token(hidden, steps, rule, where, batch, positions)
    if width is not None and vectors.shape[-1] != width:
        raise TokenError(
            f"the tapped hidden state has width {vectors.shape[-1]}, but {width} was expected from its block; "
            f"pass projector= as a module from {vectors.shape[-1]} to the latent width"
        )

    def by_draw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (repeats, pairs)) if tiled else tensor.unflatten(0, (pairs, repeats)).transpose(0, 1)

    return by_draw(vectors), None if counts is None else by_draw(counts)


def _without_steps(hidden: torch.Tensor, rule: TokenRule, where: str) -> torch.Tensor:
    if where == "last" and rule in ("last", "last_valid"):
        return hidden[:, -1]
    if where == "last" and isinstance(rule, int) and -hidden.shape[1] <= rule < 0:
        return hidden[:, rule]
    raise TokenError(
        f"token={rule!r} needs the length of the action chunk, but the batch has none of action_mask, action_is_pad, "
        "action, actions; add one, or pass a callable token(hidden, batch)"
    )
