"""GR00T's layout of observations and actions, which every checkpoint is served in and every simulator sends.

    observation  {"video": {view: uint8 [B, T, H, W, 3]}, "state": {key: float32 [B, T, D]}, "language": {key: [[str]] * B}}
    action       {key: float32 [B, H, D]}

T is the number of time steps that the policy expects, the present one last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lara_adapter.errors import FrameError, LaraArgumentError

__all__ = ["read_instructions", "read_states", "read_views"]


def read_views(observation: Any, views: list[str], steps: int) -> dict[str, NDArray[np.uint8]]:
    """Take the named views out of an observation, and check them.

    Returns:
        A uint8 array [B, T, H, W, 3] for each.

    Raises:
        FrameError: one is missing, or has another shape or dtype.
    """
    part = _part(observation, "video")
    read = {}
    for view in views:
        if view not in part:
            raise FrameError(f"observation: the view {view!r} is expected, but the video entries are {sorted(part)}")
        array = part[view]
        shape: tuple[int, ...] = getattr(array, "shape", ())
        if getattr(array, "dtype", None) != np.uint8 or len(shape) != 5 or shape[1] != steps or shape[-1] != 3:
            got = _describe(array)
            raise FrameError(f"observation: video[{view!r}] must be uint8 [B, {steps}, H, W, 3], but is {got}")
        read[view] = array
    return read


def read_states(observation: Any, key: str, width: int, steps: int) -> NDArray[np.float32]:
    """Take a state out of an observation, and check it.

    Returns:
        float32 [B, T, D].

    Raises:
        LaraArgumentError: it is missing, or has another shape or dtype, or is not finite.
    """
    part = _part(observation, "state")
    array = part.get(key)
    shape = getattr(array, "shape", ())
    if array is None or array.dtype.kind != "f" or len(shape) != 3 or tuple(shape[1:]) != (steps, width):
        got = _describe(array) if key in part else f"missing; there is {sorted(part)}"
        raise LaraArgumentError(f"observation: state[{key!r}] must be float32 [B, {steps}, {width}], but is {got}")
    if not np.isfinite(array).all():
        raise LaraArgumentError(f"observation: state[{key!r}] holds NaN or infinity")
    return array.astype(np.float32, copy=False)


def read_instructions(observation: Any, key: str, batch: int) -> list[str]:
    """Take the instruction of each sample out of an observation; where there is only one entry its key does not matter.

    Raises:
        LaraArgumentError: it is missing or of another form.
    """
    part = _part(observation, "language")
    rows = part.get(key, next(iter(part.values())) if len(part) == 1 else None)
    if not (isinstance(rows, list) and len(rows) == batch and all(map(_is_text, rows))):
        raise LaraArgumentError(
            f"observation: language[{key!r}] must hold [str] for each of {batch} samples, but is {rows!r:.200}"
        )
    return [row[0] for row in rows]


def _is_text(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 1 and isinstance(row[0], str)


def _part(observation: Any, name: str) -> dict[str, Any]:
    part = observation.get(name) if isinstance(observation, dict) else None
    if not isinstance(part, dict):
        keys = sorted(map(str, observation)) if isinstance(observation, dict) else type(observation).__name__
        raise LaraArgumentError(
            f'observation: expected a map with the maps "video", "state" and "language", got {keys}'
        )
    return part


def _describe(array: Any) -> str:
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    return f"a {type(array).__name__}" if shape is None else f"{dtype} {list(shape)}"
