"""Latent actions of every frame of an episode: each frame is encoded once, as future of one pair and present of another."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import FrameError, LaraArgumentError
from .model import LatentActionModel
from .pixels import no_difference, resize

__all__ = ["SequenceLatents", "check_settings", "choose_device", "encode_sequence"]

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class SequenceLatents(NamedTuple):
    """Latent actions of T frames, on the CPU."""

    indices: Tensor  # [T, N] int64
    latent: Tensor  # [T, N, D] float32, continuous
    valid: Tensor  # [T] bool; False where the future frame would lie past the end: the last frame then stood in for it


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto": the GPU if there is one.

    Raises:
        LaraArgumentError: torch has none of that name here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # an AssertionError says that torch was built without CUDA
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LaraArgumentError(f"device={device!r} cannot be used here: {error}") from error
    return chosen


def check_settings(gap: int, batch_size: int, dtype: str) -> None:
    """Refuse what :func:`encode_sequence` would refuse, before anything is done.

    Raises:
        LaraArgumentError: a number below one, or another dtype.
    """
    if gap < 1 or batch_size < 1:
        raise LaraArgumentError(f"gap={gap}, batch_size={batch_size}, but at least 1 is expected")
    if dtype not in _DTYPES:
        raise LaraArgumentError(f"dtype={dtype!r}, but one of {', '.join(_DTYPES)} is expected")


@torch.inference_mode()
def encode_sequence(
    model: LatentActionModel, frames: Iterable[np.ndarray], gap: int, *, batch_size: int = 64, dtype: str = "float32"
) -> SequenceLatents:
    """What `model.encode` gives for every pair (t, t + gap) of consecutive frames, at one encoding per frame.

    At most `gap` + `batch_size` encoded frames are held.

    Args:
        model: in eval mode, where it is to run; its difference images are encoded too if it reads them.
        frames: of one episode in order, [H, W, 3] uint8, all of one size; resized to the model's.
        gap: C, in frames.
        batch_size: frames at once.
        dtype: "float32", or "bfloat16" (autocast).

    Raises:
        LaraArgumentError: a number below one, or another dtype.
        FrameError: a frame of another shape or dtype.
    """
    check_settings(gap, batch_size, dtype)
    device = next(model.parameters()).device
    reduced = _DTYPES[dtype]
    autocast = torch.autocast(device.type, reduced) if reduced is not None else contextlib.nullcontext()
    images = tokens = None
    parts: list[tuple[Tensor, Tensor]] = []
    count = 0
    with autocast:
        for batch in _batches(frames, batch_size):
            _check(batch[0])
            fresh = torch.from_numpy(np.stack(batch)).to(device).permute(0, 3, 1, 2)
            fresh = resize(fresh.float() / 255, model.config.image_size)
            encoded = model.image_encoder(fresh)
            images = fresh if images is None else torch.cat([images, fresh])
            tokens = encoded if tokens is None else torch.cat([tokens, encoded])
            count += len(batch)
            ready = max(0, len(tokens) - gap)
            if ready:
                parts += _infer(model, images[:ready], images[gap:], tokens[:ready], tokens[gap:], batch_size)
                images, tokens = images[ready:], tokens[ready:]
        if images is not None and tokens is not None:  # no future within the episode: the last frame
            last = images[-1:].expand_as(images), tokens[-1:].expand_as(tokens)
            parts += _infer(model, images, last[0], tokens, last[1], batch_size)
    width = model.latent_shape
    return SequenceLatents(
        torch.cat([part[0] for part in parts]) if parts else torch.zeros(0, width[0], dtype=torch.int64),
        torch.cat([part[1] for part in parts]) if parts else torch.zeros(0, *width, dtype=torch.float32),
        torch.arange(count) + gap < count,
    )


def _check(frame: np.ndarray) -> None:
    if getattr(frame, "dtype", None) != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        got = f"{getattr(frame, 'dtype', type(frame).__name__)} {list(getattr(frame, 'shape', []))}"
        raise FrameError(f"encode_sequence: a frame is {got}, but a numpy array [H, W, 3] uint8 is expected")


def _batches(frames: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _infer(
    model: LatentActionModel, present: Tensor, future: Tensor, seen: Tensor, expected: Tensor, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices [b, N] and latents [b, N, D] of pairs of frames and of their tokens, `size` at once."""
    for now, later, *encoded in zip(*(part.split(size) for part in (present, future, seen, expected))):
        if model.config.difference_input:
            encoded.append(model.image_encoder((later - now + 1) / 2))
        nothing = model.image_encoder(no_difference(now)) if model.config.reads_nothing else None
        latent = model.inverse_dynamics(*encoded, nothing=nothing)[0]
        action = model.assign_codes(latent)
        yield action.indices.cpu(), action.continuous.float().cpu()
