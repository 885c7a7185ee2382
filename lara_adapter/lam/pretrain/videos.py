"""The videos of a pre-training run: found, indexed whole or ahead of the training, or scanned and nothing else."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...data import IndexSettings, PairStream, Source, build_index, find_sources, require_pairs
from ...data.ahead import AheadIndex
from ...data.faults import warn_of
from ...data.gap import parse_gap
from ...data.index import scan_sources
from ...data.indexed import IndexedSources
from ...data.packed import PackedSources
from ...data.pairs import read_pairs
from ...storage.files import write_json
from .settings import PretrainSettings
from .setup import progress_bar

__all__ = ["ScanResult", "Videos", "find_videos", "index_mode", "scan_videos"]

logger = logging.getLogger(__name__)

_WHOLE_SOURCES, _WHOLE_BYTES = 10_000, 10 * 10**9  # what index="auto" indexes before the first step


def find_videos(settings: PretrainSettings) -> PackedSources:
    """Every video, folder of pictures and dataset below the folders of the settings.

    Raises:
        LaraArgumentError: there is none, a folder does not exist, or a dataset has no such camera or episode.
        DatasetError: the metadata of a dataset are damaged.
    """
    sources = find_sources(
        settings.videos, cameras=settings.cameras, picture_fps=settings.picture_fps,
        episodes=settings.episodes, skip=settings.skip,
    )  # fmt: skip
    if not sources:
        require_pairs({"sources": 0, "pairs": 0, "faults": []})
    return PackedSources(sources)


class ScanResult(NamedTuple):
    """What :func:`scan_videos` did.

    folder: of the index.
    sources: in the share.
    frames: decoded now.
    unusable: sources that cannot be read.
    """

    folder: Path
    sources: int
    frames: int
    unusable: int


def scan_videos(settings: PretrainSettings, *, shard: tuple[int, int] | None = None) -> ScanResult:
    """Fill the index of a run without training: its share of it, if many machines do that at once.

    Machines need not talk to each other, only to write to the same output folder; what is there already is not done again.

    Args:
        settings: of the run.
        shard: (i, n), share number i of n, from 0; None: that of this process of `accelerate launch`, or all.

    Raises:
        LaraArgumentError: there is no video.
        DatasetError: the metadata of a dataset are damaged.
    """
    number, count = shard or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    share = find_videos(settings)[number::count]
    folder = settings.output / "index"
    scans = scan_sources(share, parse_gap(settings.gap), folder, settings.workers)
    done = list(progress_bar(True, scans, total=len(share), desc="indexing", unit="file"))
    faults = [scanned.fault for scanned in done if scanned.fault is not None]
    warn_of(faults, len(share))
    return ScanResult(folder, len(share), sum(scanned.frames for scanned in done), len(faults))


def index_mode(settings: PretrainSettings, sources: Sequence[Source]) -> str:
    """ "whole" or "ahead": what the settings say, and for "auto" what suits the size of the collection."""
    if settings.index != "auto":
        return settings.index
    if len(sources) > _WHOLE_SOURCES:
        return "ahead"
    return "ahead" if sum(map(_size, {source.path for source in sources})) > _WHOLE_BYTES else "whole"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Videos:
    """What a run trains and measures on. Every process makes one.

    Args:
        settings: of the run, filled.
        sources: from :func:`find_videos`.
        accelerator: of the run.
        fresh: the run begins; nothing that could not be read before is taken as read.

    Attributes:
        mode: "whole" or "ahead".

    Raises:
        LaraArgumentError: there is nothing to train on.
        DatasetError: every episode is damaged.
    """

    def __init__(self, settings: PretrainSettings, sources: PackedSources, accelerator: Any, *, fresh: bool) -> None:
        self._settings, self._accelerator, self._main = settings, accelerator, accelerator.is_main_process
        self._folder = settings.output / "index"
        self._pairs = IndexSettings(
            gap=parse_gap(settings.gap), cut_threshold=settings.cut_threshold, still_threshold=settings.still_threshold,
            still_keep=settings.still_keep, held_out=settings.held_out, seed=settings.seed,
        )  # fmt: skip
        self._reported: dict[str, Any] = {}
        # what was seen without decoding; such episodes are in no source
        left_out = {each.name: each.left_out for each in sources.datasets() if each.left_out}
        self._left_out = {"left_out": left_out} if left_out else {}
        self._ahead: AheadIndex | None = None
        self.mode = self._agree(index_mode(settings, sources))
        if self.mode == "whole":
            self._sources = self._index_whole(sources)
            return
        self._ahead = AheadIndex(
            sources, self._pairs, self._folder, seed=settings.seed, rank=accelerator.process_index,
            ranks=accelerator.num_processes, shuffle_frames=settings.shuffle_frames, workers=settings.workers,
        )  # fmt: skip
        self._sources = self._ahead.sources
        if fresh:
            self._ahead.begin()
        if self._main:
            logger.info("%d sources; they are indexed while it trains (--index whole: before)", len(sources))

    def stream(self, size: int) -> PairStream:
        """The pairs of this process, of frames with that side in pixels."""
        settings = self._settings
        assert settings.batch_size is not None
        assert settings.chain is not None
        return PairStream(
            self._sources, size, settings.batch_size, seed=settings.seed, rank=self._accelerator.process_index,
            ranks=self._accelerator.num_processes, chain=settings.chain, shuffle_frames=settings.shuffle_frames,
            workers=settings.workers, decoder=settings.decoder, order=self._ahead,
        )  # fmt: skip

    def held_out(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """What the main process measures on, as of :func:`~lara_adapter.data.pairs.read_pairs`; for the others nothing."""
        if not self._main:
            return []
        count = self._settings.health_pairs
        sources = self._sources if self._ahead is None else self._ahead.held_out(count)
        return read_pairs(sources, size, count, 16, self._settings.decoder)

    def report(self) -> None:
        """Write `videos.json`, if it is not what it says already; the main process does it."""
        if self._ahead is not None and self._main:
            self._write(self._ahead.report())

    def close(self) -> None:
        """Scan nothing any more."""
        if self._ahead is not None:
            self.report()
            self._ahead.close()

    def _write(self, report: dict[str, Any]) -> None:
        report = report | self._left_out
        if report != self._reported:
            self._reported = report
            write_json(self._settings.output / "videos.json", report)

    def _agree(self, value: Any) -> Any:
        """What the main process has."""
        from accelerate.utils import broadcast_object_list

        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def _index_whole(self, sources: Sequence[Source]) -> IndexedSources:
        """Scan what was not scanned before, each process its share; the main process says what came of it."""
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        share = sources[rank::ranks]
        start, decoded = time.perf_counter(), 0
        scans = scan_sources(share, self._pairs.gap, self._folder, self._settings.workers)
        for scanned in progress_bar(self._main, scans, total=len(share), desc="indexing", unit="file"):
            decoded += scanned.frames
        seconds = time.perf_counter() - start
        self._accelerator.wait_for_everyone()
        # what could not be read is tried again, by one process, so that all have the same
        index = build_index(sources, self._pairs, self._folder) if self._main else None
        if index is not None:
            speed = round(decoded / seconds, 1) if decoded else None
            self._write({**index.report, "indexed_frames_per_second": speed})
        report, state = self._agree(None if index is None else (index.report, index.sources.state()))
        require_pairs(report)
        if index is not None:
            counts = {name: value for name, value in report.items() if isinstance(value, int)}
            logger.info("video: %s", ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()))
            return index.sources
        return IndexedSources(sources, self._pairs, self._folder, **state)
