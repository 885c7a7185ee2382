"""A call of a policy's forward: read its batch, take out the frames, fold the LARA terms into its loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import FrameError, HostOutputError
from .frames import FramePair

__all__ = ["HostCall", "fold_loss", "host_loss"]


class HostCall:
    """One call of the policy's forward.

    Attributes:
        args: positional arguments, the frames taken out.
        kwargs: keyword arguments, the frames taken out.
        batch: where tokens and frames are looked up: the entries of the first argument if it is a mapping, and the named
            arguments.
        first: the first argument as it was passed (a user's callable receives it).
    """

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read a call.

        Args:
            names: the positional parameters of the policy's forward, without self.
            args: as passed.
            kwargs: as passed.
        """
        named = {**dict(zip(names, args)), **kwargs}
        self.args, self.kwargs = args, dict(kwargs)
        self._first_name = names[0] if names else None
        self.first: Any = args[0] if args else named.get(self._first_name, named)  # type: ignore[arg-type]
        self.batch: dict[str, Any] = {**named, **self.first} if isinstance(self.first, Mapping) else named
        self._names = names

    def take_frames(self, key: str, accepts: bool) -> tuple[Any, Any]:
        """Take the frames and their flags out of the call, so that the policy cannot see the future.

        The caller's batch is not changed: the policy gets a shallow copy without the two keys.

        Args:
            key: batch key of the frames; the flags are under `<key>_valid`.
            accepts: whether the policy's forward takes any keyword.

        Returns:
            The two values, None for what is absent.
        """
        keys = (key, f"{key}_valid")
        if isinstance(self.first, Mapping) and any(name in self.first for name in keys):
            reduced = _without(self.first, keys)
            if self.args:
                self.args = (reduced, *self.args[1:])
            elif self._first_name in self.kwargs:
                self.kwargs[str(self._first_name)] = reduced
            self.first = reduced
        for name in keys:
            if name in self.kwargs and (accepts or name not in self._names):
                del self.kwargs[name]
        return self.batch.get(keys[0]), self.batch.get(keys[1])


def _without(batch: Mapping[str, Any], keys: tuple[str, ...]) -> Mapping[str, Any]:
    if type(batch) is dict:
        return {name: value for name, value in batch.items() if name not in keys}
    reduced = copy.copy(batch)  # keeps the type: BatchFeature, BatchEncoding, TensorDict
    for name in keys:
        if name in reduced:
            del reduced[name]  # type: ignore[attr-defined]
    return reduced


def read_frames(call: HostCall, frames: str | Callable[[Any], Any], taken: tuple[Any, Any] | None) -> FramePair:
    """The checked pair of frames of a call.

    Raises:
        FrameError: no frames in the batch, or see :meth:`FramePair.from_tensor`.
    """
    if isinstance(frames, str):
        value, valid = taken or (None, None)
        if value is None:
            raise FrameError(
                f"the batch has no {frames!r}; it has {sorted(map(str, call.batch))[:20]}. Add frames "
                "[B, 2, 3, H, W] (present, future), or pass attach_lara(frames=key or callable)"
            )
        return FramePair.from_tensor(value, valid, name=frames)
    pair = frames(call.first)
    name = getattr(frames, "__name__", type(frames).__name__)
    if isinstance(pair, torch.Tensor):
        return FramePair.from_tensor(pair, name=name)
    if not isinstance(pair, FramePair):
        raise FrameError(f"frames callable {name} returned {type(pair).__name__}, but a FramePair is expected")
    return pair.checked(name)


def host_loss(output: Any) -> torch.Tensor:
    """The loss inside what a policy's forward returned in training.

    Raises:
        HostOutputError: there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss") and not isinstance(output, torch.Tensor):
        loss = output.loss
    elif isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        keys = f" with {sorted(map(str, output))[:10]}" if isinstance(output, Mapping) else ""
        raise HostOutputError(
            f"the policy's forward returned {type(output).__name__}{keys} in training; LARA can fold its loss into a "
            "mapping with 'loss', a tuple (loss, ...), or a tensor of losses. Otherwise pass add_to_loss=False and add "
            "lara.losses.total yourself"
        )
    return loss


def fold_loss(
    output: Any, total: torch.Tensor, per_sample: torch.Tensor | None, metrics: Callable[[], dict[str, float]]
) -> Any:
    """Add the LARA terms to the output of the policy's forward, keeping its type.

    Args:
        output: a mapping or object with "loss", a tuple (loss, dict | None | anything, ...), or a tensor of losses.
        total: scalar; added to a scalar loss, or to every element of an unreduced one, which keeps `.mean()` right.
        per_sample: [B] whose mean is `total`, used where the host returns one loss per sample; None: `total` is used.
        metrics: returns plain floats for the dict of a (loss, dict) host; called only for those.

    Raises:
        HostOutputError: see :func:`host_loss`.
    """
    loss = host_loss(output)
    extra = total
    if per_sample is not None and loss.ndim == 1 and loss.shape == per_sample.shape:
        extra = per_sample
    loss = loss + extra.to(loss.dtype)
    if isinstance(output, torch.Tensor):
        return loss
    if type(output) is dict:
        return {**output, "loss": loss}
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]  # ModelOutput and BatchFeature keep item and attribute in step
        return output
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        rest = output[1:]
        if len(rest) == 1 and (rest[0] is None or isinstance(rest[0], dict)):  # LeRobot: (loss, dict) or (loss, None)
            rest = ({**(rest[0] or {}), **metrics()},)
        return (loss, *rest)
    if hasattr(output, "_replace"):  # a NamedTuple with a field `loss`
        return output._replace(loss=loss)
    output.loss = loss
    return output
