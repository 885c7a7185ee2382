"""openpi's Observation with the pair of frames beside it; importing this module imports openpi (and JAX)."""

from __future__ import annotations

from typing import Any

from flax import struct
from openpi.models.model import Observation

__all__ = ["LaraObservation"]


@struct.dataclass
class LaraObservation(Observation):
    """What the model reads of an Observation, unchanged, and what LARA reads; `jax.tree.map` reaches all of it.

    The frames are not among `images`: the model never sees them, and they stay uint8 until the LAM has them.

    Attributes:
        lara_frames: uint8 [B, 2, 3, H, W] (present, future), or [B, V, 2, 3, H, W] of V cameras; None: a stock
            observation.
        lara_frames_valid: bool [B], False where the future frame lies past the end of the episode.
    """

    lara_frames: Any = None
    lara_frames_valid: Any = None

    @classmethod
    def around(cls, observation: Observation, frames: Any, valid: Any) -> LaraObservation:
        """The same observation with frames."""
        fields = {name: getattr(observation, name) for name in Observation.__dataclass_fields__}
        return cls(**fields, lara_frames=frames, lara_frames_valid=valid)
