"""The labelled copy of a dataset."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from ...data.dataset import ranges
from ...data.episodes import EpisodeDataset
from ...storage.files import replace_file
from .labels import LabelSet
from .metadata import Statistics, write_metadata
from .plan import dataset_files
from .write import write_data_file

__all__ = ["copied_bytes", "write_copy"]

logger = logging.getLogger(__name__)


def copied_bytes(source: EpisodeDataset, work: Path, link: bool) -> int:
    """How many bytes a copy needs that are not links."""
    device = work.stat().st_dev
    files = [(name, path.stat()) for name, path in dataset_files(source.root)]
    return sum(stat.st_size for name, stat in files if not (link and _is_large(name) and stat.st_dev == device))


def write_copy(
    labels: LabelSet, source: EpisodeDataset, listed: Set[int], data: Sequence[str], statistics: Statistics, copy: Path,
    provenance: dict[str, Any], link: bool,
) -> None:  # fmt: skip
    """Build the labelled copy of a dataset.

    Args:
        labels: of the labelled episodes.
        source: the dataset.
        listed: the episodes that its metadata list.
        data: its parquet files of frames that get the new columns; others stay as they are.
        statistics: which it keeps.
        copy: folder of the copy; what an earlier run left there is used or replaced.
        provenance: goes to `meta/lara.json` and into the parquet files.
        link: hard-link videos and pictures where the file system can.
    """
    for left in copy.rglob(".*.new-*") if copy.exists() else ():  # of a run killed while it wrote a file
        left.unlink()
    without: set[int] = set()
    for name in data:
        without |= write_data_file(labels, source.root / name, copy / name, provenance)
    if strange := without - (listed - labels.episodes.keys()):
        logger.warning(
            "%s: the parquet files hold rows of episodes %s that the metadata do not list; they get no labels",
            source.name, ranges(strange),
        )  # fmt: skip
    ours = {*data, *write_metadata(labels, source, statistics, copy, provenance)}
    for name, path in dataset_files(source.root):
        if name not in ours:
            _link_or_copy(path, copy / name, link and _is_large(name))


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    """Hard-link a file, or copy it where that is not possible."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)  # the Hub's cache holds links to the files themselves
            return
        except OSError as error:
            logger.debug("%s is copied: %s", source, error)
    with replace_file(target) as fresh:
        shutil.copyfile(source, fresh)


def _is_large(name: str) -> bool:
    return name.startswith(("videos/", "images/"))
