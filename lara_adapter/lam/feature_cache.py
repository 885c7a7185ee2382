"""Features of a frozen image encoder, kept on disk.

Joint training reads the frames of a few demonstrations hundreds of times, and the encoder is most of the cost of a latent
action model. The key of a frame is a hash of its pixels, so any dataset and any order will do, and the future frame of
one pair is found again as the present frame of another. Features are stored as the encoder computed them.

    FOLDER/<encoder>-<precision>/cache.json          what the features are of
    FOLDER/<encoder>-<precision>/<writer>.features   rows of P x E numbers, read through a memory map
    FOLDER/<encoder>-<precision>/<writer>.index      a record for each row: 128-bit key, CRC-32 of the row

Every process writes its own files and reads those that existed when it started, so that ranks and runs can share a
folder; a data loader's workers also read what is added later. A row is written before its record, so that a killed
process leaves only complete records.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import AdapterFormatError
from ..storage.files import read_json, write_json

__all__ = ["FeatureCache", "Store", "folder_of", "pixel_keys"]

logger = logging.getLogger(__name__)

_SCHEMA = 1
_RECORD = struct.Struct("<QQI")  # key, CRC-32
_FIRST_LINE = 1000  # frames after which the log says how many were found; then after twice as many, and so on
_GROW = 256  # rows by which a features file grows: a memory map has a fixed length
Key = tuple[int, int]


class CachedEncoder(Protocol):
    """What a cache needs of a frozen image encoder: the backbone, and how images are brought to it."""

    network: Any
    config: Any

    def compute(self, images: Tensor) -> Tensor:
        """Tokens [B, P, E] of images [B, 3, H, W]."""


class FeatureCache:
    """The tokens of a frozen image encoder, looked up or computed. Made by :meth:`LatentActionModel.cache_features`.

    Copies (deepcopy) share one cache; an unpickled one opens its files again.

    Attributes:
        dtype: of the stored features; None: the one that the model reads them in, so that losses do not change: that of
            autocast, else the encoder's.
        max_bytes: bound on the bytes that this process writes; None: none.
        hits: frames found.
        prefetched: of them, those whose features came with the batch, see :meth:`LatentActionModel.prefetch_features`.
        misses: frames encoded.
    """

    def __init__(
        self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None, max_bytes: int | None = None
    ) -> None:
        self.folder, self.dtype, self.max_bytes = Path(folder), dtype, max_bytes
        self.hits = self.misses = self.prefetched = 0
        self._said = _FIRST_LINE  # frames at which the next line of the log is due
        self._stores: dict[str, Store] = {}
        self._fingerprint: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}

    @property
    def bytes_written(self) -> int:
        """Bytes of features that this process has added."""
        return sum(store.written for store in self._stores.values())

    def encode(self, encoder: CachedEncoder, images: Tensor) -> Tensor:
        """Tokens [B, P, E] of images [B, 3, H, W] float32; those not in the cache are computed by `encoder`.

        Equal to `encoder.compute(images)` up to rounding, where that depends on which images share a batch.

        Raises:
            AdapterFormatError: a stored row is damaged (its checksum is wrong), or the folder is of another schema.
        """
        keys = pixel_keys(images)
        store = self._store(encoder, images)
        new = {key: place for place, key in reversed(list(enumerate(keys))) if key not in store}
        found = [place for place, key in enumerate(keys) if key not in new]
        self._count(len(keys) - len(new), len(new), store)
        if len(new) == len(keys):  # nothing known or repeated: the whole batch, as without a cache
            tokens = encoder.compute(images)
            store.add(keys, tokens, self.max_bytes)
            return store.as_given(tokens)
        if not new:
            return store.as_given(store.read(keys, images.device))
        first = sorted(new.values())
        computed = encoder.compute(images[first])
        store.add([keys[place] for place in first], computed, self.max_bytes)
        tokens = store.as_given(computed)
        # where each image's tokens are among the computed ones; the rest is overwritten
        row = {place: number for number, place in enumerate(first)}
        result = tokens[[row.get(new.get(key, -1), 0) for key in keys]]
        if found:
            result[found] = store.as_given(store.read([keys[place] for place in found], images.device))
        return result

    @property
    def hit_rate(self) -> float:
        """Share of the frames that were found, [0, 1]; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    def count_prefetched(self, frames: int) -> None:
        """Count frames whose features came with the batch."""
        self.prefetched += frames
        self._count(frames, 0, None)

    def _count(self, hits: int, misses: int, store: Store | None) -> None:
        self.hits += hits
        self.misses += misses
        if self.hits + self.misses < self._said:
            return
        self._said = 2 * (self.hits + self.misses)
        seen = self.hits + self.misses
        known = "" if store is None else f" {len(store.where)} frames, {store.size / 1e9:.1f} GB;"
        came = f", {100 * self.prefetched / seen:.1f} % came with the batch" if self.prefetched else ""
        logger.info(
            "feature cache %s:%s %.1f %% of the last %d were in it%s",
            self.folder if store is None else store.folder, known, 100 * self.hit_rate, seen, came,
        )  # fmt: skip

    def fingerprint(self, encoder: CachedEncoder) -> str:
        """Of the backbone's weights and its preprocessing; computed once."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(encoder)
        return self._fingerprint

    def _store(self, encoder: CachedEncoder, images: Tensor) -> Store:
        kind = images.device.type
        autocast = torch.is_autocast_enabled(kind)
        precision = str(torch.get_autocast_dtype(kind) if autocast else torch.float32).removeprefix("torch.")
        if precision not in self._stores:
            # what reads the features under autocast is a linear layer, which would round them so in any case
            dtype = torch.get_autocast_dtype(kind) if autocast and self.dtype is None else self.dtype
            fingerprint = self.fingerprint(encoder)
            self._stores[precision] = Store(folder_of(self, fingerprint, precision), fingerprint, dtype)
        return self._stores[precision]


def folder_of(cache: FeatureCache, fingerprint: str, precision: str) -> Path:
    """Where a cache keeps the features of one encoder, run in one precision ("float32", "bfloat16")."""
    stored = "" if cache.dtype is None else "-" + str(cache.dtype).removeprefix("torch.")
    return cache.folder / f"{fingerprint[:16]}-{precision}{stored}"


class Store:
    """The features of one encoder in one precision."""

    def __init__(self, folder: Path, fingerprint: str, dtype: torch.dtype | None) -> None:
        self.folder, self.fingerprint, self.dtype = folder, fingerprint, dtype
        self.where: dict[Key, tuple[int, int]] = {}  # key -> which file, which row
        self.maps: list[np.memmap | None] = []
        self.checks: dict[Key, int] = {}  # of rows not verified yet
        self.written = 0
        self.shape: tuple[int, ...] = ()
        self.gives = torch.float32
        self.full = False
        self._writer: _Writer | None = None
        self._opened: dict[Path, tuple[int, int]] = {}  # index file -> number in `maps`, rows known
        if (folder / "cache.json").is_file():
            self.read_files()

    def __contains__(self, key: Key) -> bool:
        return key in self.where

    def read_files(self) -> None:
        """Take in what other processes have written; only of a store that does not write itself.

        Raises:
            AdapterFormatError: the folder is of another schema or image encoder.
        """
        about = read_json(self.folder / "cache.json")
        if about.get("schema_version") != _SCHEMA or about.get("encoder") != self.fingerprint:
            raise AdapterFormatError(
                f"{self.folder / 'cache.json'} is of another schema or image encoder; remove the folder, it is made again"
            )
        self.shape, self.dtype = tuple(about["shape"]), getattr(torch, about["stored"])
        self.gives = getattr(torch, about["dtype"])
        for index in sorted(self.folder.glob("*.index")):
            features = index.with_suffix(".features")
            number, known = self._opened.get(index, (len(self.maps), 0))
            rows = min(index.stat().st_size // _RECORD.size, features.stat().st_size // self._row_bytes())
            if rows <= known:
                continue
            if number == len(self.maps):
                self.maps.append(None)
            self.maps[number] = np.memmap(features, np.uint8, "r", shape=(rows, self._row_bytes()))
            self._opened[index] = number, rows
            with index.open("rb") as file:
                file.seek(known * _RECORD.size)
                records = file.read((rows - known) * _RECORD.size)
            for row, (high, low, check) in enumerate(_RECORD.iter_unpack(records), known):
                self.where[high, low] = number, row
                self.checks[high, low] = check
        logger.info("feature cache %s: %d frames known", self.folder, len(self.where))

    def _row_bytes(self) -> int:
        assert self.dtype is not None
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def add(self, keys: list[Key], tokens: Tensor, max_bytes: int | None) -> None:
        """Write rows; if the disk is full, training goes on without writing."""
        if self.full:
            return
        if not self.shape:
            self.shape, self.gives = tuple(tokens.shape[1:]), tokens.dtype
            self.dtype = self.dtype or tokens.dtype
        rows = tokens.detach().to("cpu", self.dtype).contiguous().flatten(1).view(torch.uint8).numpy()
        try:
            for key, row in zip(keys, rows):
                if key in self.where:
                    continue
                if max_bytes is not None and self.written + row.nbytes > max_bytes:
                    self._stop(f"its bound of {max_bytes / 1e9:.1f} GB is reached")
                    return
                if self._writer is None:
                    self._begin()
                assert self._writer is not None
                self.maps[self._writer.number] = None  # mapped again, longer, when it is read
                self.where[key] = self._writer.number, self._writer.add(key, row)
                self.written += row.nbytes
        except OSError as error:
            self._stop(str(error))

    def _begin(self) -> None:
        assert self.dtype is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "cache.json").exists():
            about = {
                "schema_version": _SCHEMA, "encoder": self.fingerprint, "shape": list(self.shape),
                "stored": str(self.dtype).removeprefix("torch."), "dtype": str(self.gives).removeprefix("torch."),
            }  # fmt: skip
            write_json(self.folder / "cache.json", about)
        self.maps.append(None)
        self._writer = _Writer(self.folder / uuid.uuid4().hex, len(self.maps) - 1, self._row_bytes())

    def _stop(self, why: str) -> None:
        self.full = True
        logger.warning("feature cache %s: no more frames are kept (%s); training goes on", self.folder, why)

    @property
    def size(self) -> int:
        """Bytes of the features that this process knows of."""
        return len(self.where) * self._row_bytes() if self.shape else 0

    def as_given(self, tokens: Tensor) -> Tensor:
        """Tokens in the encoder's dtype."""
        return tokens if tokens.dtype == self.gives else tokens.to(self.gives)

    def read(self, keys: list[Key], device: torch.device) -> Tensor:
        """Rows [n, P, E] of known keys, copied from the file once, and once to the device."""
        assert self.dtype is not None
        buffer = torch.empty(
            len(keys), self._row_bytes(), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
        )
        self._fill(buffer, range(len(keys)), keys)
        return buffer.view(self.dtype).unflatten(1, self.shape).to(device, non_blocking=True)

    def read_some(self, keys: Sequence[Key | None]) -> Tensor:
        """Rows [n, P, E] of known keys, zeros for None; of a data loader's worker in shared memory, as a batch is."""
        assert self.dtype is not None
        size = len(keys) * self._row_bytes()
        shared = get_worker_info() is not None  # where it would be copied to in any case
        storage = torch.UntypedStorage._new_shared(size) if shared else torch.UntypedStorage(size)
        buffer = torch.empty(0, dtype=torch.uint8).set_(storage).view(len(keys), -1)
        places = [place for place, key in enumerate(keys) if key is not None]
        if len(places) < len(keys):
            buffer.zero_()
        self._fill(buffer, places, [key for key in keys if key is not None])
        return buffer.view(self.dtype).unflatten(1, self.shape)

    def _fill(self, buffer: Tensor, places: Iterable[int], keys: Iterable[Key]) -> None:
        """Copy the rows of known keys to places of a buffer [n, bytes]."""
        rows = buffer.numpy()
        for i, key in zip(places, keys):
            file, row = self.where[key]
            if self.maps[file] is None:
                assert self._writer is not None
                self.maps[file] = self._writer.map()
            rows[i] = self.maps[file][row]  # type: ignore[index]
            check = self.checks.pop(key, None)  # once per row that another process wrote
            if check is not None and zlib.crc32(rows[i].data) != check:
                raise AdapterFormatError(
                    f"{self.folder}: a stored row is damaged (its checksum is wrong); remove the folder, it is made again"
                )


class _Writer:
    """The files of one process."""

    def __init__(self, stem: Path, number: int, row_bytes: int) -> None:
        self.number, self.row_bytes, self.rows, self.room = number, row_bytes, 0, 0
        self.path = stem.with_suffix(".features")
        self.features, self.index = self.path.open("w+b"), stem.with_suffix(".index").open("wb")

    def add(self, key: Key, row: np.ndarray) -> int:
        """Append a row; returns its number."""
        if self.rows == self.room:
            self.room += _GROW
            self.features.truncate(self.room * self.row_bytes)
        self.features.seek(self.rows * self.row_bytes)
        self.features.write(row.data)
        self.features.flush()
        self.index.write(_RECORD.pack(*key, zlib.crc32(row.data)))
        self.index.flush()
        self.rows += 1
        return self.rows - 1

    def map(self) -> np.memmap:
        """The rows written so far."""
        return np.memmap(self.path, np.uint8, "r", shape=(self.rows, self.row_bytes))


# ---------------------------------------------------------------------- keys

_MIXERS: dict[tuple[int, str], Tensor] = {}


def pixel_keys(images: Tensor) -> list[Key]:
    """A 128-bit key of each image [B, ...] float32, of its exact bits and order; synchronises with the device once."""
    bits = images.detach().float().contiguous().flatten(1).view(torch.int32)
    where = bits.shape[1], str(images.device)
    if where not in _MIXERS:
        # two random linear hashes modulo 2^64; its own generator leaves the policy's random state alone
        generator = torch.Generator().manual_seed(0x1A2A)
        mixer = torch.randint(-(2**63), 2**63 - 1, (2, bits.shape[1]), generator=generator)
        _MIXERS[where] = (mixer | 1).to(images.device)
    # on a CPU one image after the other: products of eight bytes a number stay in its own memory
    parts = [bits.to(torch.int64)] if images.device.type != "cpu" else (row.to(torch.int64) for row in bits.split(1))
    mixed = (torch.stack([(part * mixer).sum(1) for mixer in _MIXERS[where]], dim=1) for part in parts)
    return [(high % 2**64, low % 2**64) for part in mixed for high, low in part.tolist()]


def _fingerprint(encoder: CachedEncoder) -> str:
    """Of the backbone's weights and its preprocessing: a name and a revision do not identify the weights."""
    digest = hashlib.sha256()
    assert encoder.network is not None
    for name, tensor in sorted(encoder.network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = encoder.config
    digest.update(repr((config.encoder_size, config.image_mean, config.image_std)).encode())
    return digest.hexdigest()
