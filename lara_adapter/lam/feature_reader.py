"""Cached features read by the data loader's workers: a batch brings them, and the step waits for nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..frames import FramePair, frame_keys
from .feature_cache import Key, Store, pixel_keys
from .pixels import prepare_pair, with_difference

__all__ = ["FeatureReader"]

logger = logging.getLogger(__name__)

_LOOK_AGAIN = 1.0  # seconds after which a worker looks for rows that others have written since


class FeatureReader:
    """A collate function that adds the cached features of a batch's frames. Picklable, for spawned workers.

    Made by :meth:`LatentActionModel.prefetch_features`. The features [B, V, K, P, E] are under `<frames>_features`, K being
    the present and the future frame, and the difference image of a LAM that takes one. A batch of which a frame is not in
    the cache does not get the key: its step looks up what there is, encodes the rest and adds it to the cache.

    Attributes:
        frames: batch key of the frames.
        folder: of the features.
    """

    def __init__(
        self, collate: Callable[[Any], Any], frames: str, folder: Path, fingerprint: str, size: int, difference: bool
    ) -> None:
        self.collate, self.frames, self._keys = collate, frames, frame_keys(frames)
        self.folder, self.fingerprint, self.size, self.difference = folder, fingerprint, size, difference
        self._store: Store | None = None
        self._looked = 0.0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None, "_looked": 0.0}

    def __call__(self, samples: Any) -> Any:
        """Collate, and add the features where all are known."""
        batch = self.collate(samples)
        for place in (batch, *(batch.values() if isinstance(batch, Mapping) else ())):  # GR00T's is {"inputs": batch}
            if isinstance(place, MutableMapping) and self.frames in place:
                found = self.read(place[self.frames], place.get(self._keys[1]))
                if found is not None:
                    place[self._keys[2]] = found
                break
        return batch

    def add_to(self, samples: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The samples of a batch, before they are collated, each with its own features where all are known."""
        if not all(self.frames in sample for sample in samples):
            return list(samples)
        frames, valid = (
            torch.stack([torch.as_tensor(sample[key]) for sample in samples]) if key in samples[0] else None
            for key in self._keys[:2]
        )
        found = self.read(frames, valid)
        if found is None:
            return list(samples)
        return [{**sample, self._keys[2]: row} for sample, row in zip(samples, found)]

    def read(self, frames: Any, valid: Any = None) -> Tensor | None:
        """The features [B, V, K, P, E] of frames [B, 2, 3, S, S] or [B, V, 2, 3, S, S]; None where one is not known.

        Args:
            frames: uint8 in [0, 255] or float in [0, 1]; a tensor or an array.
            valid: [B] bool; other pairs are not looked up, their features are 0.

        Raises:
            FrameError: wrong dtype, shape or range.
            AdapterFormatError: a stored row is damaged, or the folder is of another schema.
        """
        frames, valid = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (frames, valid))
        pair = FramePair.from_tensor(frames, valid, name=self.frames)
        if pair.present.shape[-2:] != (self.size, self.size):
            if not self._warned:
                logger.warning(
                    "%s has frames of %s pixels, but the LAM's are of %d: it resizes them, so their features are looked up "
                    "in the step and not by the data loader's workers. Resize them in the dataset (frame_size=%d)",
                    self.frames, list(pair.present.shape[-2:]), self.size, self.size,
                )  # fmt: skip
                self._warned = True
            return None
        rows = pair.valid.nonzero().flatten().tolist()
        if not rows or not self._open():
            return None
        views = pair.present.shape[1]
        images = prepare_pair(pair.present[rows].flatten(0, 1), pair.future[rows].flatten(0, 1), None, self.size)
        images = with_difference(images) if self.difference else images
        keys = pixel_keys(images.flatten(0, 1))
        pairs = images.shape[1]
        known = [keys[k * pairs + row] for row in range(pairs) for k in range(len(images))]
        if not self._has(known):
            return None
        assert self._store is not None
        each = views * len(images)  # rows of a sample
        wanted: list[Key | None] = [None] * (len(pair.valid) * each)
        for place, row in enumerate(rows):
            wanted[row * each : (row + 1) * each] = known[place * each : (place + 1) * each]
        return self._store.read_some(wanted).unflatten(0, (len(pair.valid), views, len(images)))

    def _open(self) -> bool:
        if self._store is None and (self.folder / "cache.json").is_file():
            self._store = Store(self.folder, self.fingerprint, None)
            self._looked = time.monotonic()
        return self._store is not None

    def _has(self, keys: Sequence[Key]) -> bool:
        """Whether all keys are known; looks again at the files if not."""
        assert self._store is not None
        if all(key in self._store for key in keys):
            return True
        if time.monotonic() < self._looked + _LOOK_AGAIN:
            return False
        self._store.read_files()
        self._looked = time.monotonic()
        return all(key in self._store for key in keys)
