"""What a labelling did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .labels import LabelSet

__all__ = ["LabelReport", "summarize"]


class LabelReport(NamedTuple):
    """What was done."""

    output: str  # the copy, the sidecar, or the folder of the shard
    episodes: int  # labelled, those of an earlier run included
    frames: int  # in them
    resumed: int  # episodes that an earlier run had labelled
    invalid: int  # frames whose future lies past the end of their episode
    codes_used: int  # codes chosen at least once, in valid frames
    features: tuple[str, ...]  # names of the columns
    left_out: dict[str, str]  # damaged episodes: number -> why
    not_selected: list[str]  # of the other episodes: numbers ("7"), and ranges without their end ("0:5")
    actions: dict[str, Any] | None = None  # how good the decoded actions are: r2, r2_interval, episodes, ...

    @classmethod
    def make(
        cls, output: Path, result: Mapping[str, Any], features: tuple[str, ...], resumed: int | None = None
    ) -> LabelReport:
        """From a result as the provenance has it.

        Args:
            output: the copy, the sidecar, or the folder of the shard.
            result: see :func:`summarize`; one of an earlier release says nothing about episodes without labels.
            features: names of the columns.
            resumed: None: all episodes.
        """
        done = {"left_out": {}, "not_selected": [], "resumed": result["episodes"], **result}
        if resumed is not None:
            done["resumed"] = resumed
        return cls(str(output), features=features, **{name: done[name] for name in cls._fields if name in done})


def summarize(
    labels: LabelSet, left_out: Mapping[int, str], not_selected: list[str], actions: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of a labelling as JSON: which episodes have labels and which not, and how good they are."""
    frames, invalid, used = 0, 0, set()
    for number in labels.episodes:
        own = labels.of(number)
        frames += len(own.valid)
        invalid += int((~own.valid).sum())
        used |= set(np.unique(own.indices[own.valid]).tolist())
    return {
        "episodes": len(labels.episodes),
        "frames": frames,
        "invalid": invalid,
        "codes_used": len(used),
        "left_out": {str(number): left_out[number] for number in sorted(left_out)},
        "not_selected": not_selected,
        **({} if actions is None else {"actions": actions}),
    }
