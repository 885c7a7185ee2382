"""A frame that is the future of one pair and the present of another is encoded once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ...data import PairBatch
from ..image_encoder import FrozenImageEncoder
from ..model import LatentActionModel

__all__ = ["share_frames"]


class _EncodedOnce:
    """In place of a feature cache: each frame of a batch, on the model's device, is encoded once."""

    def __init__(self, batch: PairBatch) -> None:
        self.places = torch.cat([batch.present, batch.future])
        order = torch.arange(len(self.places), device=self.places.device)
        self.first = order.new_empty(batch.frames.shape[0]).scatter_(0, self.places.flip(0), order.flip(0))

    def encode(self, encoder: FrozenImageEncoder, images: Tensor) -> Tensor:
        """Tokens of [presents, futures, other images], equal to `encoder.compute(images)` up to rounding."""
        rest = images[len(self.places) :]
        tokens = encoder.compute(torch.cat([images[self.first], rest]))
        others = torch.arange(len(self.first), len(tokens), device=tokens.device)
        return tokens[torch.cat([self.places, others])]


@contextlib.contextmanager
def share_frames(model: LatentActionModel, batch: PairBatch) -> Iterator[None]:
    """Within this context a forward on the pairs of `batch` runs the frozen encoder, if there is one, once per frame."""
    encoder = model.image_encoder
    if not isinstance(encoder, FrozenImageEncoder):
        yield
        return
    before, encoder.cache = encoder.cache, _EncodedOnce(batch)  # type: ignore[assignment]
    try:
        yield
    finally:
        encoder.cache = before
