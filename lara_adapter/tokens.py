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

__all__ = ["ActionSteps", "TokenRule", "action_steps", "check_rule", "select_rows", "select_token"]

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


def action_steps(batch: Mapping[str, Any]) -> ActionSteps | None:
    """Read T and the padding from a batch.

    Looks for `action_mask` ([B, T] or [B, T, A], nonzero = valid), `action_is_pad` ([B, T], True = padding), then
    `action` or `actions` ([B, T, A], nothing padded). None if the batch has none of them.

    Raises:
        TokenError: one of them has another shape.
    """
    mask = batch.get(MASK_KEY)
    if isinstance(mask, torch.Tensor):
        if mask.ndim not in (2, 3):
            raise TokenError(f"action_mask has shape {list(mask.shape)}, but [B, T] or [B, T, A] is expected")
        return ActionSteps((mask != 0).any(-1) if mask.ndim == 3 else mask != 0)
    padding = batch.get(PADDING_KEY)
    if isinstance(padding, torch.Tensor):
        if padding.ndim != 2:
            raise TokenError(f"action_is_pad has shape {list(padding.shape)}, but [B, T] is expected")
        return ActionSteps(~padding.bool())
    for key in ACTION_KEYS:
        action = batch.get(key)
        if isinstance(action, torch.Tensor):
            if action.ndim != 3:
                raise TokenError(f"{key} has shape {list(action.shape)}, but [B, T, A] is expected")
            return ActionSteps(torch.ones(action.shape[:2], dtype=torch.bool, device=action.device))
    return None


def select_token(
    hidden: torch.Tensor, steps: ActionSteps | None, rule: TokenRule, where: str, batch: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The aligned vector of each row.

    Args:
        hidden: [R, S, D], the tapped state; R = r * B rows, in the order of `steps` already.
        steps: the action steps of the R rows; None: unknown.
        rule: see :func:`check_rule`. An integer counts the steps of the action chunk, negative from its end.
        where: "last" or "first": which T of the S positions are action tokens.
        batch: what a callable rule receives besides `hidden`.

    Returns:
        The vectors [R, D], and [R] bool, True where the row has at least one valid step (None: all have).

    Raises:
        TokenError: the state has another shape than [R, S, D], S < T, or the rule needs T and it is unknown.
    """
    if hidden.ndim != 3:
        raise TokenError(
            f"the tapped hidden state has shape {list(hidden.shape)}, but [B, sequence, width] is expected"
        )
    if callable(rule):
        token = rule(hidden, batch)
        if not isinstance(token, torch.Tensor) or list(token.shape) != [hidden.shape[0], hidden.shape[2]]:
            got = list(token.shape) if isinstance(token, torch.Tensor) else type(token).__name__
            raise TokenError(f"token= callable returned {got}, but [{hidden.shape[0]}, {hidden.shape[2]}] is expected")
        return token, None
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
    actions = hidden[:, start : start + horizon]
    valid = steps.valid.to(hidden.device)
    any_valid = valid.any(1)
    if rule == "mean_valid":
        weight = valid.to(hidden.dtype)
        mean = (actions * weight[..., None]).sum(1) / weight.sum(1).clamp_min(1)[:, None]
        return mean, any_valid
    if rule == "last_valid":
        index = (valid * torch.arange(horizon, device=hidden.device)).amax(1)
    else:
        step = -1 if rule == "last" else int(rule)
        if not -horizon <= step < horizon:
            raise TokenError(f"token={step}, but the action chunk has {horizon} steps; use {-horizon}..{horizon - 1}")
        index = torch.full((rows,), step % horizon, device=hidden.device)
        # a fixed step may be padding in some rows: those rows do not count
        any_valid = valid.gather(1, index[:, None]).squeeze(1)
    return actions[torch.arange(rows, device=hidden.device), index], any_valid


def select_rows(
    hidden: torch.Tensor,
    steps: ActionSteps | None,
    rule: TokenRule,
    *,
    pairs: int,
    width: int | None,
    where: str,
    draws: str | None,
    batch: Any,
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

    Returns:
        [r, B, D], and [r, B] bool or None, as :func:`select_token`.

    Raises:
        TokenError: rows or width do not fit, or see :func:`select_token`.
    """
    rows = hidden.shape[0]
    repeats = rows // pairs if rows % pairs == 0 else 0
    if repeats == 0 or (repeats > 1 and draws is None):
        raise TokenError(
            f"the tapped hidden state has {rows} rows, but the batch has {pairs} pairs of frames. If this policy "
            "repeats each sample for several noise draws, say how: PolicySpec(draws='tile' or 'interleave')"
        )
    if width is not None and hidden.shape[-1] != width:
        raise TokenError(
            f"the tapped hidden state has width {hidden.shape[-1]}, but {width} was expected from its block; "
            f"pass projector= as a module from {hidden.shape[-1]} to the latent width"
        )
    tiled = draws != "interleave"
    if steps is not None and repeats > 1 and len(steps.valid) == pairs:
        valid = steps.valid.repeat(repeats, 1) if tiled else steps.valid.repeat_interleave(repeats, 0)
        steps = ActionSteps(valid)
    vectors, counts = select_token(hidden, steps, rule, where, batch)

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
