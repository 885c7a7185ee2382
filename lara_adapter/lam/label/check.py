"""What would stop the writing of a labelled copy, found before any frame is decoded."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from ...data.episodes import EpisodeDataset
from ...data.parquet import require_parquet
from ...data.sources import shown
from ...errors import LaraArgumentError
from .labels import LabelColumns

__all__ = ["DataFiles", "check_data_files", "check_prefix"]

_KEYS = ("episode_index", "frame_index", "index")  # the last for the sidecar alone


class DataFiles(NamedTuple):
    """The parquet files of frames."""

    sound: list[str]  # relative to the dataset; those that get the new columns
    damaged: dict[int, str]  # episodes of the other files: number -> why


def check_prefix(source: EpisodeDataset, columns: LabelColumns) -> None:
    """Refuse names that features of the dataset have already.

    Raises:
        LaraArgumentError: one does.
    """
    _refuse_taken(source.name, columns, source.features)


def check_data_files(source: EpisodeDataset, columns: LabelColumns | None, everything: bool) -> DataFiles:
    """Read the parquet files that a copy would extend, without their pictures; or the few columns that a sidecar needs.

    Args:
        source: its `episodes` are to be labelled.
        columns: the new features; None: for a sidecar.
        everything: the files without any of these episodes as well.

    Raises:
        LaraArgumentError: a file has a column of the new features.
    """
    inside: defaultdict[str, list[int]] = defaultdict(list)
    for episode in source.episodes:
        inside[episode.data].append(episode.number)
    names = set(inside)
    if everything:
        paths = (source.root / "data").rglob("*.parquet")
        names |= {path.relative_to(source.root).as_posix() for path in paths if path.is_file()}
    pictures = {name for name, feature in source.features.items() if feature.get("dtype") == "image"}
    sound: list[str] = []
    damaged: dict[int, str] = {}
    for name in sorted(names):
        problem = _problem(source, name, columns, pictures)
        if problem is None:
            sound.append(name)
        else:
            damaged |= dict.fromkeys(inside[name], f"{shown(source.root / name)}: {problem}")
    return DataFiles(sound, damaged)


def _problem(source: EpisodeDataset, name: str, columns: LabelColumns | None, pictures: set[str]) -> str | None:
    """Why a file cannot be extended."""
    import pyarrow as pa

    try:
        with require_parquet().ParquetFile(source.root / name) as file:
            schema = file.schema_arrow
            if columns is not None:
                _refuse_taken(shown(source.root / name), columns, schema.names)
            keys = list(_KEYS if columns is None else _KEYS[:2])
            for key in keys:
                if key not in schema.names or not pa.types.is_integer(schema.field(key).type):
                    return f"it does not have a column {key} of integers"
            read = keys if columns is None else [column for column in schema.names if column not in pictures]
            for group in range(file.num_row_groups):
                file.read_row_group(group, read)
    except (pa.ArrowException, OSError) as error:
        return " ".join(str(error).split())
    return None


def _refuse_taken(owner: str, columns: LabelColumns, names: Any) -> None:
    if taken := sorted(set(columns.names) & set(names)):
        raise LaraArgumentError(
            f"prefix={columns.prefix!r}: {owner} has {', '.join(taken)} already; choose another prefix"
        )
