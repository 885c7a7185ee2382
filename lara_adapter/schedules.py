"""Weights w1, w2 of LARA, Eq. 7 that change with the step.

A weight is a float, one of the schedules here, or any callable(step) -> float. A step is one training forward of
the policy (so with gradient accumulation over k batches, k steps an update); `lara.step` can be read and set.
The schedules here compute with tensors, so they neither synchronise with the device nor break torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .errors import AdapterFormatError, LaraArgumentError

__all__ = ["Constant", "Cosine", "Cutoff", "Schedule", "Warmup", "check_weight", "weight_at", "weight_from_json",
           "weight_to_json"]  # fmt: skip


def _check(name: str, **values: float) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise LaraArgumentError(f"{name}: {key}={value!r}, but a finite number >= 0 is expected")


class Schedule:
    """A weight as a function of the step; called with a 0-dim integer tensor or an int."""

    def __post_init__(self) -> None:
        _check(type(self).__name__, **asdict(self))  # type: ignore[call-overload]

    def __call__(self, step: torch.Tensor | int) -> torch.Tensor:
        """The weight at a step, as a 0-dim float32 tensor on the step's device."""
        raise NotImplementedError


def _float(step: torch.Tensor | int) -> torch.Tensor:
    return torch.as_tensor(step).to(torch.float32)


@dataclass(frozen=True)
class Constant(Schedule):
    """`weight` at every step."""

    weight: float

    def __call__(self, step: torch.Tensor | int) -> torch.Tensor:
        """`weight`."""
        return torch.full_like(_float(step), self.weight)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Linear from 0 to `weight` over `steps` steps, then constant."""

    weight: float
    steps: int

    def __call__(self, step: torch.Tensor | int) -> torch.Tensor:
        """`weight * min(step / steps, 1)`."""
        return self.weight * (_float(step) / max(self.steps, 1)).clamp(max=1.0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine over `steps` steps, then `end`."""

    start: float
    end: float
    steps: int

    def __call__(self, step: torch.Tensor | int) -> torch.Tensor:
        """`end + (start - end) * (1 + cos(pi * step / steps)) / 2`."""
        done = (_float(step) / max(self.steps, 1)).clamp(max=1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + torch.cos(math.pi * done))


@dataclass(frozen=True)
class Cutoff(Schedule):
    """`weight` before step `steps`, 0 from there on."""

    weight: float
    steps: int

    def __call__(self, step: torch.Tensor | int) -> torch.Tensor:
        """`weight` if `step < steps` else 0."""
        now = _float(step)
        return (now < self.steps).float() * self.weight


_KINDS: dict[str, type[Schedule]] = {cls.__name__.lower(): cls for cls in (Constant, Warmup, Cosine, Cutoff)}

Weight = float | Schedule | Callable[[int], float]


def check_weight(name: str, weight: Weight) -> None:
    """Refuse what is not a weight.

    Raises:
        LaraArgumentError: neither a finite number >= 0 nor callable.
    """
    if not callable(weight):
        _check("attach_lara", **{name: weight})


def check_share(name: str, share: float) -> float:
    """The share of something, as a float.

    Raises:
        LaraArgumentError: it is not a number in (0, 1].
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise LaraArgumentError(f"{name}={share!r}, but a number in (0, 1] is expected")
    return float(share)


def weight_at(weight: Weight, step: torch.Tensor) -> float | torch.Tensor:
    """The weight at a step: the float itself, a 0-dim tensor for our schedules, a float for a user's callable."""
    if isinstance(weight, Schedule):
        return weight(step)
    if callable(weight):
        value = float(weight(int(step)))
        if not math.isfinite(value) or value < 0:
            raise LaraArgumentError(
                f"the weight schedule returned {value} at step {int(step)}; a number >= 0 is expected"
            )
        return value
    return float(weight)


def weight_to_json(weight: Weight) -> Any:
    """A weight as JSON: a number, a mapping with "schedule", or None for a user's callable."""
    if isinstance(weight, Schedule):
        return {"schedule": type(weight).__name__.lower(), **asdict(weight)}  # type: ignore[call-overload]
    return None if callable(weight) else float(weight)


def weight_from_json(value: Any) -> Weight | None:
    """The inverse of :func:`weight_to_json`; None where a callable was saved.

    Raises:
        AdapterFormatError: unknown schedule or fields.
    """
    if isinstance(value, Mapping):
        rest = dict(value)
        kind = _KINDS.get(str(rest.pop("schedule", None)))
        if kind is None or set(rest) != {field.name for field in fields(kind)}:  # type: ignore[arg-type]
            raise AdapterFormatError(f"{dict(value)} is not a weight schedule; known: {sorted(_KINDS)}")
        return kind(**rest)
    return value
