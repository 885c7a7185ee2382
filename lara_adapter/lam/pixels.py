"""Frames as the model takes them: checked, in [0, 1], at one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FrameError

__all__ = ["no_difference", "prepare_pair", "resize", "unit", "with_difference"]


def resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize images, bilinear with antialiasing; the aspect ratio is not kept.

    The one resize of this library, except for video that is decoded for pre-training: there FFmpeg scales while it
    converts to RGB (:class:`lara_adapter.data.video.Converter`).

    Args:
        images: [..., C, H, W] float, or uint8 in [0, 255]: on a CPU by torch's own uint8 kernel, which is several times
            faster than the way over float and at most one level off it.
        size: (height, width) in pixels of the result; an int: square.

    Returns:
        [..., C, height, width] in the dtype of `images`; the same object if it has that size already.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == (height, width):
        return images
    batch = images.reshape(-1, *images.shape[-3:])
    if images.dtype == torch.uint8 and images.device.type != "cpu":
        batch = batch.float()
    resized = F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    if resized.dtype != images.dtype:
        resized = resized.round().clamp(0, 255).to(images.dtype)
    return resized.reshape(*images.shape[:-2], height, width)


def unit(frames: Tensor) -> Tensor:
    """uint8 frames as float32 in [0, 1], with the same bits on every device: cached features are found by them."""
    if frames.device.type == "cpu":
        return frames.float().div_(255)
    # CUDA divides by a number as a product with its inverse, which is one bit off for some values
    return frames.float().div_(torch.full((), 255.0, device=frames.device))


def with_difference(frames: Tensor) -> Tensor:
    """Pairs [2, B, 3, S, S] float32 in [0, 1] with the difference image: [3, B, 3, S, S]."""
    return torch.cat([frames, (frames[1:] - frames[:1]).add_(1).div_(2)])


def no_difference(frames: Tensor) -> Tensor:
    """The difference image of two equal frames, [1, 3, S, S], for frames [B, 3, S, S]: grey all over."""
    return torch.full_like(frames[:1], 0.5)


def _check(name: str, frames: Tensor) -> None:
    if not isinstance(frames, Tensor) or frames.ndim != 4 or frames.shape[1] != 3:
        got = list(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
        raise FrameError(f"{name} is {got}, but a tensor [B, 3, H, W] is expected")
    if frames.dtype != torch.uint8 and not frames.is_floating_point():
        raise FrameError(f"{name} is {frames.dtype}, but uint8 in [0, 255] or a float type in [0, 1] is expected")


def prepare_pair(frame_t: Tensor, frame_future: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """Check a batch of frame pairs and bring it into the model's form.

    Args:
        frame_t: [B, 3, H, W], uint8 in [0, 255] or float in [0, 1] (the range is not checked).
        frame_future: the same, C frames later.
        valid: [B] bool, or None for all; the frames of other samples are blanked, so that a NaN in a padded frame
            cannot reach a weight (0 x NaN is NaN).
        size: side in pixels of the result.

    Returns:
        [2, B, 3, size, size] float32: the present frames, and the future ones.

    Raises:
        FrameError: wrong dtype or shape, or the two do not belong together.
    """
    if isinstance(frame_t, Tensor) and isinstance(frame_future, Tensor) and frame_t.shape != frame_future.shape:
        raise FrameError(
            f"frame_t is {list(frame_t.shape)} and frame_future {list(frame_future.shape)}, but equal shapes are expected"
        )
    _check("frame_t", frame_t)
    _check("frame_future", frame_future)
    if valid is not None and (valid.dtype != torch.bool or valid.shape != frame_t.shape[:1]):
        raise FrameError(
            f"valid is {valid.dtype} {list(valid.shape)}, but bool [{frame_t.shape[0]}], one per pair, is expected"
        )
    frames = torch.stack([frame_t, frame_future])
    if valid is not None:  # while a number is still one byte
        frames = torch.where(valid[:, None, None, None], frames, 0)
    if frames.dtype == torch.uint8:
        return resize(unit(frames), size)
    return resize(frames.float(), size)
