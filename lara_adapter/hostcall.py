"""A call of a policy's forward: read its batch, take out the frames, fold the LARA terms into its loss."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .batches import lookup, replaced, with_fields, without
from .errors import FrameError, HostOutputError
from .frames import FramePair, frame_keys

__all__ = ["HostCall", "fold_loss", "host_loss", "refuse_prediction"]


class HostCall:
    """One call of the policy's entry.

    Attributes:
        args: positional arguments, the frames taken out.
        kwargs: keyword arguments, the frames taken out.
        batch: where tokens and frames are looked up: the entries of the first argument, and the named arguments.
        first: the first argument as it was passed (a user's callable receives it).
    """

    def __init__(
        self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], keys: Iterable[str] = ()
    ) -> None:
        """Read a call.

        Args:
            names: the positional parameters of the entry, without self.
            args: as passed.
            kwargs: as passed.
            keys: entries that will be looked up; only for batches that are not mappings, see :mod:`.batches`.

        Raises:
            FrameError: the samples of a batch do not fit together.
        """
        named = {**dict(zip(names, args)), **kwargs}
        self.args, self.kwargs = args, dict(kwargs)
        self._first_name = names[0] if names else None
        self.first: Any = args[0] if args else named.get(self._first_name, named)  # type: ignore[arg-type]
        try:
            # not `self.first is named`: torch 2.7's Dynamo cannot compare dicts
            entries = lookup(self.first, keys) if args or self._first_name in named else {}
        except ValueError as error:
            raise FrameError(str(error)) from None
        # an object's attributes do not hide arguments of the same name
        self.batch: dict[str, Any] = {**named, **entries} if isinstance(self.first, Mapping) else {**entries, **named}
        self._names = names

    def take_frames(self, key: str, accepts: bool) -> tuple[Any, Any, Any]:
        """Take the frames, their flags and their features out of the call, so that the policy cannot see the future.

        The caller's batch is not changed: the policy gets a shallow copy without these keys.

        Args:
            key: batch key of the frames; the flags are under `<key>_valid`, cached features under `<key>_features`.
            accepts: whether the entry takes any keyword.

        Returns:
            The three values, None for what is absent.
        """
        keys = frame_keys(key)
        self._set_first(without(self.first, keys))
        for name in keys:
            if name in self.kwargs and (accepts or name not in self._names):
                del self.kwargs[name]
        frames, valid, features = (self.batch.get(name) for name in keys)
        return frames, valid, features

    def with_entry(self, key: str, value: torch.Tensor) -> HostCall:
        """The same call with another tensor under a key that its batch has."""
        double = copy.copy(self)
        double.kwargs, double.batch = dict(self.kwargs), {**self.batch, key: value}
        if key in self.kwargs:
            double.kwargs[key] = value
        elif key in self._names[: len(self.args)]:
            at = self._names.index(key)
            double.args = (*self.args[:at], value, *self.args[at + 1 :])
        else:
            double._set_first(replaced(self.first, key, value))
        return double

    def _set_first(self, value: Any) -> None:
        if self.args:
            self.args = (value, *self.args[1:])
        elif self._first_name in self.kwargs:
            self.kwargs[str(self._first_name)] = value
        self.first = value


def read_frames(
    call: HostCall, frames: str | Callable[[Any], Any], taken: tuple[Any, ...] | None, optional: bool = False
) -> FramePair | None:
    """The checked pair of frames of a call; None where there is none and that is allowed.

    Raises:
        FrameError: no frames in the batch, or see :meth:`FramePair.from_tensor`.
    """
    if isinstance(frames, str):
        value, valid = taken[:2] if taken else (None, None)
        if value is None:
            if optional:
                return None
            holder = {call._first_name} if isinstance(call.first, Mapping) else set()
            there = sorted(map(str, call.batch.keys() - holder))[:20]
            raise FrameError(
                f"the batch has no {frames!r}; it has {there}. Add frames "
                "[B, 2, 3, H, W] (present, future), or pass attach_lara(frames=key or callable). If the dataset has them, "
                "transformers' Trainer dropped them: LaraCallback.add_to(trainer, lara), or remove_unused_columns=False. "
                "If some batches of a co-training have none: attach_lara(frames_optional=True)"
            )
        return FramePair.from_tensor(value, valid, name=frames)
    pair = frames(call.first)
    if pair is None and optional:
        return None
    name = getattr(frames, "__name__", type(frames).__name__)
    if isinstance(pair, torch.Tensor):
        return FramePair.from_tensor(pair, name=name)
    if not isinstance(pair, FramePair):
        raise FrameError(f"frames callable {name} returned {type(pair).__name__}, but a FramePair is expected")
    return pair.checked(name)


def host_loss(output: Any, key: str | None = None) -> torch.Tensor:
    """The loss inside what a policy's entry returned in training.

    Args:
        output: a mapping or object with the loss, a tuple or list (loss, ...), or a tensor of losses.
        key: of the loss in a mapping or object, dotted where it is inside another ("loss.action"); None: "loss".

    Raises:
        HostOutputError: there is none.
    """
    name, loss = key or "loss", output
    outer, _, inner = name.partition(".")
    if inner and (nested := _entry(output, outer)) is not None:
        return host_loss(nested, inner)
    if isinstance(output, Mapping):
        loss = output.get(name)
    elif hasattr(output, name) and not isinstance(output, torch.Tensor):
        loss = getattr(output, name)
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        keys = f" with {sorted(map(str, output))[:10]}" if isinstance(output, Mapping) else ""
        raise HostOutputError(
            f"the policy returned {type(output).__name__}{keys} in training; LARA can fold its loss into a "
            f"mapping with {name!r}, a tuple (loss, ...), or a tensor of losses. If the loss has another name, pass "
            "attach_lara(spec=PolicySpec(..., loss='name')); otherwise add_to_loss=False and add lara.losses.total yourself"
        )
    return loss


def refuse_prediction(output: Any, key: str | None = None) -> None:
    """Check that what a policy returned in training is a loss, before LARA's is added to it; reads the device.

    Args:
        output: see :func:`host_loss`.
        key: likewise.

    Raises:
        HostOutputError: it is a tensor of two dimensions or more with numbers below zero, as of predicted actions: LARA's
            loss would move these.
    """
    loss = host_loss(output, key)
    if loss.ndim > 1 and bool((loss.detach() < 0).any()):
        raise HostOutputError(
            f"the policy returned {list(loss.shape)} numbers in training, some below zero: predicted actions, it seems, "
            "not losses. If the loss is computed outside: attach_lara(add_to_loss=False), and add lara.losses.total to it. "
            "If these are losses, return their mean"
        )


def fold_loss(
    output: Any,
    total: torch.Tensor,
    per_sample: torch.Tensor | None,
    metrics: Callable[[], dict[str, float]],
    key: str | None = None,
) -> Any:
    """Add the LARA terms to the output of the policy's entry, keeping its type.

    Args:
        output: a mapping or object with "loss", a tuple or list (loss, dict | None | anything, ...), or a tensor of losses.
        total: scalar; added to a scalar loss, or to every element of an unreduced one, which keeps `.mean()` right.
        per_sample: [B] whose mean is `total`, used where the host returns one loss per sample; None: `total` is used.
        metrics: returns plain floats for the dict of a (loss, dict) host; called only for those.
        key: of the loss in a mapping or object; None: "loss".

    Raises:
        HostOutputError: see :func:`host_loss`.
    """
    name, loss = key or "loss", host_loss(output, key)
    outer, _, inner = name.partition(".")
    if inner and (nested := _entry(output, outer)) is not None:
        return _with_entry(output, outer, fold_loss(nested, total, per_sample, metrics, inner))
    extra = total
    if per_sample is not None and loss.ndim == 1 and loss.shape == per_sample.shape:
        extra = per_sample
    loss = loss + extra.to(loss.dtype)
    if isinstance(output, torch.Tensor):
        return loss
    if isinstance(output, (tuple, list)) and not hasattr(output, name):
        rest = list(output[1:])
        if len(rest) == 1 and (rest[0] is None or isinstance(rest[0], dict)):  # LeRobot: (loss, dict) or (loss, None)
            rest = [{**(rest[0] or {}), **metrics()}]
        return type(output)((loss, *rest))
    return _with_entry(output, name, loss)


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _with_entry(output: Any, name: str, value: Any) -> Any:
    """The output with another value under a key or attribute, of the same type where that can be changed."""
    if isinstance(output, Mapping):
        if type(output) is dict or not hasattr(output, "__setitem__"):
            return {**output, name: value}
        output[name] = value  # ModelOutput and BatchFeature keep item and attribute in step
        return output
    frozen = dataclasses.is_dataclass(output) and getattr(output, "__dataclass_params__").frozen  # noqa: B009
    if frozen or hasattr(output, "_replace"):
        return with_fields(output, {name: value})
    setattr(output, name, value)
    return output
