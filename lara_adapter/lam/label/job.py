"""The steps of a labelling: open and check, label, write."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.dataset import Dataset
from ...data.episodes import STATE, EpisodeDataset
from ...data.formats import open_dataset
from ...data.gap import parse_gap
from ...data.sources import shown
from ...errors import DatasetError, LaraArgumentError
from ...storage.files import check_folder
from ..identity import learnt_from, open_model, warn_of_gap
from ..processes import Processes
from ..sequence import check_settings
from .check import DataFiles, check_data_files, check_prefix
from .copy import copied_bytes, write_copy
from .decoder import Decoder, encode_demonstrations, fit_decoder
from .labels import Constant, LabelColumns, LabelFiles, LabelSet
from .metadata import Statistics, read_statistics
from .plan import make_plan, read_result
from .report import LabelReport, summarize
from .shards import Shard, as_arguments, find_shards, list_shards, share, write_complete
from .sidecar import write_sidecar
from .work import EPISODES, check_disk, label_episodes, open_work

__all__ = ["Job"]

logger = logging.getLogger(__name__)

_COPY = "copy"


class Job:
    """A labelling; the arguments are those of :func:`label_dataset`.

    Every process has one and calls :meth:`label`; :meth:`begin` and :meth:`finish` are for the first.

    Raises:
        LaraError: as :func:`label_dataset`.
    """

    def __init__(
        self, dataset: str | os.PathLike[str], lam: str | os.PathLike[str], output: str | os.PathLike[str], *,
        gap: str | int, camera: str | None, sidecar: bool, shard: Shard | None, batch_size: int, dtype: str,
        latent_dtype: str, prefix: str, link: bool, picture_fps: float | None,
        revision: str | None, dataset_revision: str | None, actions: str | os.PathLike[str] | None, least_r2: float,
    ) -> None:  # fmt: skip
        self.source = open_dataset(dataset, revision=dataset_revision, picture_fps=picture_fps)
        self.copied = None if sidecar else _copyable(self.source)
        self.camera = self.source.camera(camera)
        frames = parse_gap(gap).in_frames(self.source.fps)
        check_settings(frames, batch_size, dtype)
        self.settings: dict[str, Any] = {
            "gap": frames,
            "batch_size": batch_size,
            "dtype": dtype,
            "latent_dtype": latent_dtype,
        }
        self.target, self.shard, self.link = _check_output(Path(output), self.source, sidecar), shard, link
        self.model, self.identity = open_model(lam, revision)
        warn_of_gap(self.model, frames, self.source.fps)
        self.demonstrations, self.least_r2 = None, least_r2
        if actions is not None:
            self.demonstrations = open_dataset(actions, argument="actions")
        self.columns = LabelColumns(
            prefix, *self.model.latent_shape, latent_dtype, **self._action_feature(prefix), constants=self._state()
        )
        if self.copied is not None:
            check_prefix(self.copied, self.columns)
        hidden = self.target.with_name(f".{self.target.name}.labelling")
        self.work = hidden if shard is None else shard.folder(self.target)
        self.files = LabelFiles(self.work / EPISODES, self.columns, exact=isinstance(self.source, EpisodeDataset))

    def _action_feature(self, prefix: str) -> dict[str, Any]:
        """The feature of decoded actions, as arguments of LabelColumns: "action", or PREFIX.action where that is taken."""
        if self.demonstrations is None:
            return {}
        known = self.demonstrations
        feature = known.features.get("action") if isinstance(known, EpisodeDataset) else None
        if feature is None:
            raise LaraArgumentError(
                f"actions: {known.name} is not a dataset of the LeRobot format with a column 'action'"
            )
        if known.fps != self.source.fps:
            raise LaraArgumentError(
                f"actions: {known.name} has {known.fps:g} frames per second, but {self.source.name} has "
                f"{self.source.fps:g}: an action of one is not an action of the other"
            )
        self.known_camera = known.camera(self.camera if self.camera in known.cameras else None)
        taken = self.copied is not None and "action" in self.copied.features
        width = int(np.prod(feature["shape"]))
        name = f"{prefix}.action" if taken else "action"
        return {"action": name, "action_names": feature.get("names"), "action_width": width}

    def _state(self) -> dict[str, Constant]:
        """The mean state of the demonstrations, for video without one: a policy that takes a state needs a column of it."""
        known, name = self.demonstrations, STATE
        if self.copied is None or not isinstance(known, EpisodeDataset) or name in self.copied.features:
            return {}
        states = []
        for episode in known.episodes:
            with contextlib.suppress(DatasetError):  # said when its actions are read
                if (found := known.states(episode)) is not None:
                    states.append(found[np.isfinite(found).all(1)])
        if not sum(map(len, states)):
            return {}
        feature = {**known.features[name], "dtype": "float32"}
        logger.warning("%s has no %s: it gets the mean of the demonstrations', which hides it", self.source.name, name)
        return {name: Constant(feature, np.concatenate(states).mean(0).astype(np.float32))}

    def begin(
        self, episodes: Sequence[str], skip: Sequence[str], merge: bool, device: torch.device
    ) -> LabelReport | list[int]:
        """Find everything that is wrong and can be seen without decoding, fit the decoder, and open the work folder.

        Returns:
            The numbers of the episodes that are to be labelled; or the report, if the output is there already.
        """
        source, dtype = self.source, self.settings["dtype"]
        self.plan = make_plan(
            source, self.identity, self.camera, self.settings["gap"], dtype, self.columns, self.demonstrations
        )
        known = {episode.number for episode in source.episodes}
        self.listed = known | source.left_out.keys()
        self.left_out = {number: self._short(reason) for number, reason in source.left_out.items()}
        source.select(episodes, skip)
        self.chosen = list(source.episodes)  # to be labelled, less what turns out to be damaged
        self.not_selected = as_arguments(known - {episode.number for episode in self.chosen})
        gap, longest = self.settings["gap"], max((episode.length for episode in self.chosen), default=0)
        if self.chosen and longest <= gap:
            raise LaraArgumentError(
                f"gap={gap} frames, but the longest episode of {source.name} has {longest}: no pair is that far apart"
            )
        if self.target.exists():
            return self._existing(merge)
        if self.shard is not None:
            self.chosen = share(self.chosen, self.shard.index, self.shard.count)
            if self.chosen:
                source.select([f"{self.chosen[0].number}:{self.chosen[-1].number + 1}"])
        self._check()
        damaged: dict[int, str] = {}
        if merge:
            folders, damaged = find_shards(self.target, self.plan)
            self.files.shards = [folder / EPISODES for folder in folders]
        self.decoder, self.quality = self._fit(device)
        open_work(self.work, self.plan)
        self._check_disk()
        missing = {episode.number for episode in self.chosen if self.files.load(episode) is None}
        self.resumed = len(self.chosen) - len(missing)
        if merge:
            if lost := missing - damaged.keys():
                raise LaraArgumentError(
                    f"merge: the shards of {self.target} are complete, but do not have the episodes "
                    f"{', '.join(as_arguments(lost))}; run all shards with the same episodes and skip as the merge"
                )
            self._leave_out({number: damaged[number] for number in sorted(missing)})
            missing.clear()
        return sorted(missing)

    def _fit(self, device: torch.device) -> tuple[Decoder | None, dict[str, Any] | None]:
        """The decoder of actions and how good it is; a shard, which writes none, has none."""
        if self.demonstrations is None or self.shard is not None:
            return None, None
        made = encode_demonstrations(
            self.demonstrations, self.known_camera, self.model.to(device),
            **{key: self.settings[key] for key in ("gap", "batch_size", "dtype")},
        )  # fmt: skip
        fitted = fit_decoder(made, self.settings["gap"], self.least_r2)
        if learnt_from(self.model, self.demonstrations):
            fitted.quality["seen_by_lam"] = True
            logger.warning(
                "the latent action model learnt from the actions of %s: the decoder's R2 of %.2f flatters; lara health on "
                "other demonstrations says what it holds",
                self.demonstrations.name, fitted.quality["r2"],
            )  # fmt: skip
        return fitted.decoder, fitted.quality

    def label(self, numbers: Sequence[int], processes: Processes) -> dict[int, str]:
        """Label this process's share of those episodes; what turns out to be damaged: number -> why."""
        wanted = set(numbers)
        episodes = [episode for episode in self.source.episodes if episode.number in wanted]
        mine = share(episodes, processes.index, processes.count)
        model, show = self.model.to(processes.device), processes.index == 0
        return label_episodes(self.files, self.source, mine, self.camera, model, self.settings, show)

    def finish(self, damaged: Mapping[int, str]) -> LabelReport:
        """Write the output, or that the shard is done; without the episodes that turned out to be damaged."""
        self._leave_out(damaged)
        labels = LabelSet(self.files, self.chosen, self.decoder)
        result = summarize(labels, self.left_out, self.not_selected, self.quality)
        if self.shard is not None:
            write_complete(self.work, self.shard, self.left_out)
            return LabelReport.make(self.work, result, self.columns.names, self.resumed)
        copy, provenance = self.work / _COPY, {**self.plan, "result": result}
        if self.copied is None:
            write_sidecar(labels, self.source, copy, provenance)
        else:
            assert self.statistics is not None
            write_copy(labels, self.copied, self.listed, self.data.sound, self.statistics, copy, provenance, self.link)
        os.replace(copy, self.target)
        self._remove_work(merge=bool(self.files.shards))
        return LabelReport.make(self.target, result, self.columns.names, self.resumed)

    def _existing(self, merge: bool) -> LabelReport:
        """The report on an output that is there already."""
        result = read_result(self.target, self.plan, sidecar=self.copied is None)
        report = LabelReport.make(self.target, result, self.columns.names)
        without = ""
        if report.left_out:
            without += f"; damaged and left out: {', '.join(as_arguments(map(int, report.left_out)))}"
        if report.not_selected:
            without += f"; not selected: {', '.join(report.not_selected)}"
        logger.warning(
            "%s is there already, from the same dataset, model and settings: nothing to do. It has the labels of %d "
            "episodes%s", self.target, report.episodes, without,
        )  # fmt: skip
        if self.shard is None:
            self._remove_work(merge)  # of a run killed right after the rename
        return report

    def _remove_work(self, merge: bool) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        for shard in list_shards(self.target) if merge else ():
            shutil.rmtree(shard.folder(self.target), ignore_errors=True)

    def _check(self) -> None:
        """Leave out what is damaged; refuse what would stop the writing."""
        self.statistics: Statistics | None = None
        self.data = DataFiles([], {})
        if not self.chosen:
            return
        source = self.source
        damaged = source.check([self.camera], rows=isinstance(source, EpisodeDataset))
        if isinstance(source, EpisodeDataset):
            columns = None if self.copied is None else self.columns
            whole = self.copied is not None and self.shard is None
            self.data = check_data_files(source, columns, everything=whole)
            damaged = self.data.damaged | damaged
        if self.copied is not None:
            self.statistics = read_statistics(self.copied, self.listed)
        self._leave_out(damaged)

    def _leave_out(self, damaged: Mapping[int, str]) -> None:
        """Go on without damaged episodes; a shard also where none is left."""
        reasons = {number: self._short(reason) for number, reason in sorted(damaged.items())}
        self.chosen = [episode for episode in self.chosen if episode.number not in reasons]
        if self.chosen or self.shard is None:
            self.source.leave_out(reasons)
        elif reasons:
            logger.warning("shard %s: every episode of it is damaged: %s", self.shard, next(iter(reasons.values())))
        self.left_out |= reasons

    def _short(self, reason: str) -> str:
        """A reason without the folder of the dataset."""
        return reason.replace(f"{shown(self.source.root)}{os.sep}", "")

    def _check_disk(self) -> None:
        frames = sum(episode.length for episode in self.chosen)
        at_most = 2 * frames * (8 * self.columns.queries + 4 * self.columns.numbers)  # per episode, and written
        copied = 0
        if self.copied is not None and self.shard is None:
            copied = copied_bytes(self.copied, self.work, self.link)
        check_disk(self.work, at_most, copied)


def _copyable(source: Dataset) -> EpisodeDataset:
    if isinstance(source, EpisodeDataset):
        return source
    raise LaraArgumentError(
        f"{source.name} is not a dataset of the LeRobot format, so that only a sidecar can be written: add --sidecar "
        "(sidecar=True) and an output that ends in .parquet"
    )


def _check_output(target: Path, source: Dataset, sidecar: bool) -> Path:
    """The absolute output; refuses what could harm the source or is of the wrong kind."""
    target, root = target.absolute(), source.root.resolve()
    if sidecar and target.suffix != ".parquet":
        raise LaraArgumentError(f"output={str(target)!r}, but with sidecar a file that ends in .parquet is expected")
    check_folder("output", target.parent if sidecar else target)
    resolved = target.resolve()
    if resolved == root or root in resolved.parents or resolved in root.parents:
        raise LaraArgumentError(f"output={str(target)!r} is, holds or lies in the dataset {root}; choose another place")
    return target
