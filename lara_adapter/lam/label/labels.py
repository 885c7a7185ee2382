"""The labels of a dataset while they are made: one file per episode, and the new features they become."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.episodes import Episode, EpisodeDataset
from ...errors import AdapterFormatError, DatasetError
from ...storage.files import read_tensors

__all__ = ["LabelColumns", "LabelSet", "Labels"]

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """Labels of one episode of T frames."""

    indices: np.ndarray  # [T, N] int64
    latent: np.ndarray  # [T, N * D], float32 or float16
    valid: np.ndarray  # [T] bool


class LabelColumns:
    """The three new features: their names, types and entries in `meta/info.json`.

    Args:
        prefix: PREFIX.indices, PREFIX.latent and PREFIX.valid are their names.
        queries: N.
        width: D.
        dtype: of the latent, "float32" or "float16".
    """

    def __init__(self, prefix: str, queries: int, width: int, dtype: str) -> None:
        self.names = tuple(f"{prefix}.{field}" for field in Labels._fields)
        self.queries, self.numbers = queries, queries * width
        tokens = [f"token_{token}" for token in range(queries)]
        numbers = [f"{token}.{number}" for token in tokens for number in range(width)]
        self.features: dict[str, dict[str, Any]] = {
            self.names[0]: {"dtype": "int64", "shape": [queries], "names": tokens},
            self.names[1]: {"dtype": dtype, "shape": [self.numbers], "names": numbers},
            self.names[2]: {"dtype": "bool", "shape": [1], "names": None},
        }

    def arrays(self, labels: Labels) -> dict[str, Any]:
        """Name -> arrow array; lists of fixed length, as LeRobot writes them, or plain numbers where that is 1."""
        import pyarrow as pa

        made = {}
        for name, values in zip(self.names, labels):
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


class LabelSet:
    """The labels of a dataset's episodes, in a folder.

    Args:
        folder: one safetensors file per episode.
        dataset: the source.
        columns: the new features.
    """

    def __init__(self, folder: Path, dataset: EpisodeDataset, columns: LabelColumns) -> None:
        self.folder, self.dataset, self.columns = folder, dataset, columns
        self.get = functools.lru_cache(maxsize=2)(self._get)

    def path(self, number: int) -> Path:
        """The file of an episode."""
        return self.folder / f"{number:06d}.safetensors"

    def load(self, episode: Episode) -> Labels | None:
        """The labels of an episode; None if there are none, or the file is damaged or incomplete."""
        path = self.path(episode.number)
        if not path.is_file():
            return None
        try:
            tensors = read_tensors(path)
            labels = Labels(*(tensors[name].numpy() for name in Labels._fields))
        except (AdapterFormatError, KeyError) as error:
            logger.warning("%s is made again: %s", path, error)
            return None
        shapes = [(episode.length, self.columns.queries), (episode.length, self.columns.numbers), (episode.length,)]
        return labels if [array.shape for array in labels] == shapes else None

    def _get(self, number: int) -> Labels:
        """The labels of the episode of that number.

        Raises:
            DatasetError: the dataset's metadata do not list this episode.
        """
        episode = self.dataset.episode(number)
        labels = None if episode is None else self.load(episode)
        if labels is None:
            raise DatasetError(f"{self.dataset.root} holds frames of episode {number}, which its metadata do not list")
        return labels
