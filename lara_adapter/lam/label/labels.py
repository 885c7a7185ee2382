"""The labels of a dataset while they are made: one file per episode, and the new features they become."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import AdapterFormatError, DatasetError
from ...storage.files import read_tensors
from .decoder import Decoder

__all__ = ["Constant", "LabelColumns", "LabelFiles", "LabelSet", "Labels"]

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """Labels of one episode of T frames."""

    indices: np.ndarray  # [T, N] int64
    latent: np.ndarray  # [T, N * D], float32 or float16
    valid: np.ndarray  # [T] bool
    action: np.ndarray | None = None  # [T, A] float32, where they are decoded


_STORED = Labels._fields[:3]  # what the files of episodes hold


class Constant(NamedTuple):
    """A feature that has the same W values float32 in every frame, and its entry in `meta/info.json`."""

    feature: dict[str, Any]
    values: np.ndarray


class LabelColumns:
    """The new features: their names, types and entries in `meta/info.json`.

    Args:
        prefix: PREFIX.indices, PREFIX.latent and PREFIX.valid are their names.
        queries: N.
        width: D.
        dtype: of the latent, "float32" or "float16".
        action: name of the feature of decoded actions; None: there is none.
        action_names: what `meta/info.json` calls its numbers.
        action_width: how many they are.
        constants: further features by name.
    """

    def __init__(
        self, prefix: str, queries: int, width: int, dtype: str, *, action: str | None = None, action_names: Any = None,
        action_width: int = 0, constants: Mapping[str, Constant] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.prefix, self.names = prefix, tuple(f"{prefix}.{field}" for field in _STORED)
        self.fields = Labels._fields if action else _STORED
        self.queries, self.numbers = queries, queries * width
        tokens = [f"token_{token}" for token in range(queries)]
        numbers = [f"{token}.{number}" for token in tokens for number in range(width)]
        self.features: dict[str, dict[str, Any]] = {
            self.names[0]: {"dtype": "int64", "shape": [queries], "names": tokens},
            self.names[1]: {"dtype": dtype, "shape": [self.numbers], "names": numbers},
            self.names[2]: {"dtype": "bool", "shape": [1], "names": None},
        }
        if action is not None:
            self.names = (*self.names, action)
            self.features[action] = {"dtype": "float32", "shape": [action_width], "names": action_names}
        self.constants = constants
        self.names = (*self.names, *constants)
        self.features |= {name: constant.feature for name, constant in constants.items()}

    def shapes(self, frames: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of what the file of an episode of so many frames holds."""
        return (frames, self.queries), (frames, self.numbers), (frames,)

    def zeros(self, frames: int) -> Labels:
        """What frames without labels get: zeros, and valid False."""
        features = list(self.features.values())
        decoded = features[len(_STORED) : len(self.fields)]
        shapes = [*self.shapes(frames), *((frames, *feature["shape"]) for feature in decoded)]
        return Labels(*(np.zeros(shape, feature["dtype"]) for shape, feature in zip(shapes, features)))

    def named(self, labels: Labels) -> dict[str, np.ndarray]:
        """Name -> values."""
        own = {name: values for name, values in zip(self.names, labels) if values is not None}
        return own | {name: np.tile(each.values, (len(labels.valid), 1)) for name, each in self.constants.items()}

    def arrays(self, labels: Labels) -> dict[str, Any]:
        """Name -> arrow array; lists of fixed length, as LeRobot writes them, or plain numbers where that is 1."""
        import pyarrow as pa

        made = {}
        for name, values in self.named(labels).items():
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            size = self.features[name]["shape"][0]
            made[name] = flat if size == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
        return made

    def huggingface(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The features as the datasets library describes them, as List or Sequence like the `known` ones."""
        kinds = [entry.get("_type") for entry in known.values() if isinstance(entry, dict)]
        kind = "List" if "List" in kinds else "Sequence"
        made: dict[str, Any] = {}
        for name, feature in self.features.items():
            value, size = {"dtype": feature["dtype"], "_type": "Value"}, feature["shape"][0]
            made[name] = value if size == 1 else {"feature": value, "length": size, "_type": kind}
        return made


class LabelFiles:
    """Files with the labels of episodes, one for each.

    Args:
        folder: where they are written.
        columns: the new features.
        exact: the length of an episode is what its dataset says, and not what a video turned out to hold.

    Attributes:
        shards: other folders where they may be.
    """

    def __init__(self, folder: Path, columns: LabelColumns, exact: bool) -> None:
        self.folder, self.columns, self.exact = folder, columns, exact
        self.shards: Sequence[Path] = ()

    def path(self, number: int) -> Path:
        """Where the labels of an episode are written."""
        return self.folder / f"{number:06d}.safetensors"

    def load(self, episode: Any) -> Labels | None:
        """The labels of an episode; None if there are none, or the file is damaged or incomplete."""
        own = self.path(episode.number)
        for path in (own, *(folder / own.name for folder in self.shards)):
            if not path.is_file():
                continue
            try:
                tensors = read_tensors(path)
                labels = Labels(*(tensors[name].numpy() for name in _STORED))
            except (AdapterFormatError, KeyError) as error:
                logger.warning("%s does not count: %s", path, error)
                continue
            length = episode.length if self.exact else len(labels.valid)
            if tuple(array.shape for array in labels[:3]) == self.columns.shapes(length):
                return labels
        return None


class LabelSet:
    """The labels of episodes that all have them.

    Args:
        files: where they are.
        episodes: those that were labelled.
        decoder: of their actions; None: these are not wanted.
    """

    def __init__(self, files: LabelFiles, episodes: Iterable[Any], decoder: Decoder | None = None) -> None:
        self.files, self.columns, self.decoder = files, files.columns, decoder
        self.episodes = {episode.number: episode for episode in episodes}
        self.get = functools.lru_cache(maxsize=2)(self._get)

    def _get(self, number: int) -> Labels | None:
        """The labels of the episode of that number; None if it was not labelled.

        Raises:
            DatasetError: its file has disappeared or was damaged since.
        """
        if number not in self.episodes:
            return None
        labels = self.files.load(self.episodes[number])
        if labels is None:
            raise DatasetError(f"the labels of episode {number} have disappeared from {self.files.folder}; run again")
        if self.decoder is not None:
            latent, valid = torch.from_numpy(labels.latent), torch.from_numpy(labels.valid)
            labels = labels._replace(action=self.decoder.decode(latent, valid).numpy())
        return labels

    def of(self, number: int) -> Labels:
        """The labels of one of `episodes`."""
        labels = self.get(number)
        assert labels is not None
        return labels
