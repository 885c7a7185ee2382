"""The pair of frames (I_t, I_{t+C}) that a batch carries for the latent action model; the policy never sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .errors import FrameError

__all__ = ["FramePair", "frame_keys"]

_SLACK = 1e-3  # resampling overshoots [0, 1] a little


def frame_keys(frames: str) -> tuple[str, str, str]:
    """Batch keys of the frames, of the flags which pairs count, and of the image encoder's cached features."""
    return frames, f"{frames}_valid", f"{frames}_features"


class FramePair(NamedTuple):
    """Present and future frames of a batch.

    Attributes:
        present: [B, V, 3, H, W] uint8 in [0, 255] or float in [0, 1]; V views.
        future: like `present`, C steps later.
        valid: [B] bool; False where t+C lies past the end of the episode: such a pair never counts.
    """

    present: torch.Tensor
    future: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def from_tensor(
        cls, frames: torch.Tensor, valid: torch.Tensor | None = None, *, name: str = "lara_frames"
    ) -> FramePair:
        """Check a batch's frames and split them.

        Args:
            frames: [B, 2, 3, H, W] (present, future), or [B, V, 2, 3, H, W] for V views; uint8 in [0, 255] or
                float in [0, 1].
            valid: [B] bool, or None if every pair is real.
            name: the batch key, for the message.

        Raises:
            FrameError: wrong type, shape, dtype, range, or NaN. Values are checked only in float frames and outside
                torch.compile; uint8 frames need no synchronisation with the device.
        """
        if not isinstance(frames, torch.Tensor):
            raise FrameError(f"{name} is a {type(frames).__name__}, but a tensor [B, 2, 3, H, W] is expected")
        shape = list(frames.shape)
        if frames.ndim not in (5, 6) or shape[-3] != 3 or shape[-4] != 2:
            raise FrameError(
                f"{name} has shape {shape}, but [B, 2, 3, H, W] (present, future) or [B, V, 2, 3, H, W] is expected"
                + _shape_hint(shape)
            )
        if frames.shape[0] == 0 or min(shape) == 0:
            raise FrameError(f"{name} has shape {shape}: it is empty")
        if frames.dtype != torch.uint8 and not frames.dtype.is_floating_point:
            raise FrameError(f"{name} is {frames.dtype}, but uint8 in [0, 255] or float in [0, 1] is expected")
        if frames.dtype.is_floating_point and not torch.compiler.is_compiling():
            _check_range(frames, name)
        if valid is None:
            valid = torch.ones(shape[0], dtype=torch.bool, device=frames.device)
        elif not isinstance(valid, torch.Tensor) or valid.dtype != torch.bool or list(valid.shape) != [shape[0]]:
            got = f"{valid.dtype} {list(valid.shape)}" if isinstance(valid, torch.Tensor) else type(valid).__name__
            raise FrameError(f"{name}_valid is {got}, but bool [{shape[0]}] is expected (one flag for each pair)")
        if frames.ndim == 5:
            frames = frames[:, None]
        return cls(frames[:, :, 0], frames[:, :, 1], valid.to(frames.device))

    def checked(self, name: str) -> FramePair:
        """The pair after the checks of :meth:`from_tensor`, for what a user's callable returned."""
        present, future, valid = self
        if not isinstance(present, torch.Tensor) or not isinstance(future, torch.Tensor):
            raise FrameError(f"{name} returned a FramePair of {type(present).__name__} and {type(future).__name__}")
        if present.shape != future.shape or present.dtype != future.dtype:
            raise FrameError(
                f"{name} returned present {present.dtype} {list(present.shape)} and future {future.dtype} "
                f"{list(future.shape)}; they must agree"
            )
        stacked = torch.stack([present, future], dim=-4)
        return FramePair.from_tensor(stacked, valid, name=name)


def _shape_hint(shape: list[int]) -> str:
    if len(shape) in (5, 6) and shape[-1] == 3:
        return "; these frames are channels-last: frames.movedim(-1, -3)"
    if len(shape) == 4:
        return "; one frame is missing: stack the present and the future frame on dim 1"
    return ""


def _check_range(frames: torch.Tensor, name: str) -> None:
    low, high = torch.stack(torch.aminmax(frames.detach())).tolist()
    if low != low or high != high:
        raise FrameError(f"{name} holds NaN")
    if low < -_SLACK or high > 1 + _SLACK:
        fix = "frames / 255, or pass uint8"
        if low < -_SLACK:
            halves = low >= -1 - _SLACK and high <= 1 + _SLACK
            fix = "(frames + 1) / 2" if halves else "undo their normalisation, frames * std + mean"
        raise FrameError(
            f"{name} is {frames.dtype} in [{low:.4g}, {high:.4g}], but float frames must lie in [0, 1]: {fix}"
        )


def read_features(features: Any, pair: FramePair) -> torch.Tensor | None:
    """The cached features [B, V, K, P, E] that came with a pair of frames; None where there are none for every sample.

    A batch of several datasets, or a list of samples, may have them for some samples only.
    """
    if not isinstance(features, torch.Tensor) or features.ndim != 5 or len(features) != len(pair.valid):
        return None
    return features.to(pair.present.device)
