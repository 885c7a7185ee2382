"""The metadata of a labelled copy: features, statistics, provenance; what is wrong with a dataset's is found first."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.dataset import ranges
from ...data.episodes import INFO, EpisodeDataset
from ...data.parquet import require_parquet
from ...data.sources import shown
from ...errors import DatasetError
from ...storage.files import replace_file, write_json
from .labels import LabelSet
from .plan import PROVENANCE
from .stats import BASIC, Stats, Total, describe, known_statistics

__all__ = ["Statistics", "read_statistics", "write_metadata"]

logger = logging.getLogger(__name__)

_STATS, _LINES = "meta/stats.json", "meta/episodes_stats.jsonl"
_Found = dict[str, Stats]  # of an episode or all: column -> its statistics


class Statistics(NamedTuple):
    """Which statistics a dataset keeps."""

    whole: dict[str, Any] | None  # content of `meta/stats.json`; None: there is none
    kinds: list[str]  # in it
    per_episode: list[str]  # per episode; empty: none


def read_statistics(source: EpisodeDataset, listed: Set[int]) -> Statistics:
    """Read the statistics of a dataset, and say which episodes they do not fit.

    Args:
        source: the dataset.
        listed: the episodes that its metadata list.

    Raises:
        DatasetError: a file is not what the format demands; its name and line.
    """
    whole: dict[str, Any] | None = None
    names: set[str] = set()
    if (source.root / _STATS).is_file():
        whole = _parse((source.root / _STATS).read_bytes(), shown(source.root / _STATS))
    for path in _episode_files(source)[:1]:
        columns = require_parquet().read_schema(path).names
        names |= {name.rpartition("/")[2] for name in columns if name.startswith("stats/")}
    if (source.root / _LINES).is_file():
        numbers: set[int] = set()
        for _, number, entry in _lines(source):
            for stats in entry["stats"].values() if not numbers else ():
                names |= set(stats) if isinstance(stats, dict) else set()
            numbers.add(number)
        _warn(source.name, numbers, listed)
    per_episode = known_statistics(names) if names else []
    kinds = {kind for stats in (whole or {}).values() if isinstance(stats, dict) for kind in stats}
    return Statistics(whole, known_statistics(kinds), per_episode)


def write_metadata(
    labels: LabelSet, source: EpisodeDataset, statistics: Statistics, target: Path, provenance: dict[str, Any]
) -> list[str]:
    """Write `meta/info.json`, the statistics and `meta/lara.json` of the labelled copy in the folder `target`.

    Statistics are over every frame of the labelled episodes, those with valid False too, as LeRobot computes its own.

    Returns:
        What was written, relative to `target`.
    """
    write_json(target / PROVENANCE, provenance)
    # not through write_json: LeRobot keeps the features in order
    _write_plain(target / INFO, {**source.info, "features": {**source.features, **labels.columns.features}})
    written = [PROVENANCE, INFO]
    kinds = sorted({*BASIC, *statistics.per_episode, *statistics.kinds})
    total = _total(labels, kinds)
    if statistics.whole is not None:
        ours = {name: _plain(stats, statistics.kinds) for name, stats in total.items()}
        _write_plain(target / _STATS, {**statistics.whole, **ours})
        written.append(_STATS)
    if (source.root / _LINES).is_file():
        with replace_file(target / _LINES) as fresh, fresh.open("w", encoding="utf-8") as file:
            file.writelines(_extended_lines(labels, source, statistics.per_episode))
        written.append(_LINES)
    # what is not labelled must not count where episodes are put together
    other = {name: {**stats, "count": np.array([0])} for name, stats in total.items()}
    for path in _episode_files(source) if statistics.per_episode else ():
        name = path.relative_to(source.root).as_posix()
        _write_episodes(labels, path, target / name, statistics.per_episode, other)
        written.append(name)
    return written


def _describe(labels: LabelSet, number: int, kinds: list[str]) -> _Found:
    return {name: describe(values, kinds) for name, values in labels.columns.named(labels.of(number)).items()}


def _total(labels: LabelSet, kinds: list[str]) -> _Found:
    totals = {name: Total() for name in labels.columns.names}
    for number in labels.episodes:
        for name, stats in _describe(labels, number, kinds).items():
            totals[name].add(stats)
    return {name: total.stats(kinds) for name, total in totals.items()}


def _plain(stats: Stats, kinds: list[str]) -> dict[str, list[float]]:
    return {kind: stats[kind].tolist() for kind in kinds}


def _episode_files(source: EpisodeDataset) -> list[Path]:
    return sorted((source.root / "meta/episodes").glob("*/*.parquet"))


def _warn(name: str, numbers: Set[int], listed: Set[int]) -> None:
    """Say which lines have no episode, and which episodes no line."""
    if left := numbers - listed:
        logger.warning("%s: %s has lines of episodes that are not listed; they stay: %s", name, _LINES, ranges(left))
    if missing := listed - numbers:
        logger.warning("%s: %s has no lines of episodes %s; none are added", name, _LINES, ranges(missing))


def _lines(source: EpisodeDataset) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The lines of `meta/episodes_stats.jsonl`: text, episode, content.

    Raises:
        DatasetError: a line is not an object with episode_index and stats.
    """
    path = source.root / _LINES
    with path.open("rb") as file:
        for place, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{shown(path)}, line {place}"
            entry = _parse(line, where)
            try:
                number = int(entry["episode_index"])
            except (KeyError, TypeError, ValueError):
                raise DatasetError(f"{where} does not have the number of its episode, episode_index") from None
            if not isinstance(entry.get("stats"), dict):
                raise DatasetError(f"{where} does not have statistics, stats")
            yield line.decode("utf-8"), number, entry


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8"))  # with NaN, which LeRobot writes
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where} is not JSON: {error}; mend or delete it") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{where} holds a JSON {type(content).__name__}, but an object is expected")
    return content


def _extended_lines(labels: LabelSet, source: EpisodeDataset, kinds: list[str]) -> Iterator[str]:
    for text, number, entry in _lines(source):
        if number in labels.episodes:
            for name, stats in _describe(labels, number, kinds).items():
                entry["stats"][name] = _plain(stats, kinds)
            text = json.dumps(entry)
        yield text.rstrip("\r\n") + "\n"


def _write_episodes(labels: LabelSet, path: Path, target: Path, kinds: list[str], other: _Found) -> None:
    """Copy a parquet file of episodes with the statistics of the new features."""
    import pyarrow as pa

    parquet = require_parquet()
    with parquet.ParquetFile(path) as file:
        table = file.read()
    numbers = table.column("episode_index").to_pylist()
    found = [_describe(labels, number, kinds) if number in labels.episodes else other for number in numbers]
    for name, kind in itertools.product(labels.columns.names, kinds):
        column = f"stats/{name}/{kind}"
        if column in table.column_names:  # left over
            table = table.drop_columns([column])
        numeric = pa.list_(pa.int64() if kind == "count" else pa.float64())
        table = table.append_column(column, pa.array([stats[name][kind] for stats in found], numeric))
    # the datasets library infers the types of all columns where it finds no description of its own
    metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
    with replace_file(target) as fresh:
        parquet.write_table(table.replace_schema_metadata(metadata or None), fresh)


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    with replace_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
