"""Shares of a labelling: of processes, and of shards that are labelled on their own and merged.

A shard is a folder beside the output: `OUTPUT.shard-0-of-4` with the plan, the labels of its episodes, and
`complete.json` once it is done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.dataset import runs
from ...errors import AdapterFormatError, LaraArgumentError
from ...storage.files import read_json, write_json
from .plan import differences

__all__ = [
    "COMPLETE",
    "PLAN",
    "Shard",
    "as_arguments",
    "find_shards",
    "list_shards",
    "share",
    "write_complete",
]

PLAN, COMPLETE = "plan.json", "complete.json"


@dataclass(frozen=True)
class Shard:
    """One of `count` shares, from 0 on."""

    index: int
    count: int

    def folder(self, target: Path) -> Path:
        """Where the shard of an output is."""
        return target.with_name(f"{target.name}.shard-{self.index}-of-{self.count}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def share(episodes: Sequence[Any], index: int, count: int) -> list[Any]:
    """The share `index` of `count`: consecutive episodes, about as many frames in each share, each episode in one."""
    total, before, chosen = max(1, sum(episode.length for episode in episodes)), 0, []
    for episode in episodes:
        # by the middle of the episode
        if min(count - 1, (2 * before + episode.length) * count // (2 * total)) == index:
            chosen.append(episode)
        before += episode.length
    return chosen


def write_complete(folder: Path, shard: Shard, left_out: Mapping[int, str]) -> None:
    """Record that a shard is done."""
    reasons = {str(number): reason for number, reason in left_out.items()}
    write_json(folder / COMPLETE, {"shard": str(shard), "left_out": reasons})


def list_shards(target: Path) -> set[Shard]:
    """The shards of an output that have a folder, whatever is in it."""
    pattern = re.compile(re.escape(target.name) + r"\.shard-([0-9]+)-of-([0-9]+)")
    matches = [pattern.fullmatch(path.name) for path in target.parent.glob("*") if path.is_dir()]
    return {Shard(int(match[1]), int(match[2])) for match in matches if match}


def find_shards(target: Path, plan: Mapping[str, Any]) -> tuple[list[Path], dict[int, str]]:
    """The folders of all shards of an output, and the damaged episodes that they left out: number -> reason.

    Raises:
        LaraArgumentError: shards are missing, unfinished, or were made with other settings.
    """
    found = list_shards(target)
    counts = sorted({shard.count for shard in found})
    if not found:
        raise LaraArgumentError(
            f"merge: there is no {Shard(0, 1).folder(target)} or the like; label with --shard first"
        )
    if len(counts) > 1:
        raise LaraArgumentError(
            f"merge: shards of {' and of '.join(map(str, counts))} lie beside {target}; delete the folders of those "
            "that are not to be merged"
        )
    every = [Shard(index, counts[0]) for index in range(counts[0])]
    left_out: dict[int, str] = {}
    wrong: list[str] = []
    for shard in every:
        folder = shard.folder(target)
        if shard not in found:
            wrong.append(f"{shard} is missing")
            continue
        try:
            if different := differences(plan, read_json(folder / PLAN)):
                raise LaraArgumentError(f"merge: {folder} was made with other settings: {different}")
            if not (folder / COMPLETE).exists():
                wrong.append(f"{shard} is unfinished")
                continue
            left_out |= {
                int(number): str(reason) for number, reason in read_json(folder / COMPLETE)["left_out"].items()
            }
        except (AdapterFormatError, KeyError, ValueError, AttributeError) as error:
            if isinstance(error, LaraArgumentError):
                raise
            raise LaraArgumentError(f"merge: {folder} is damaged: {error}; delete it, and label it again") from error
    if wrong:
        raise LaraArgumentError(
            f"merge: of the shards of {target}, {', '.join(wrong)}; run the same command with --shard for each, or copy "
            f"its folder {Shard(0, counts[0]).folder(target).name.replace('shard-0', 'shard-I')} here"
        )
    return [shard.folder(target) for shard in every], left_out


def as_arguments(numbers: Iterable[int]) -> list[str]:
    """Numbers of episodes as --episodes takes them: ["0:5", "7"]."""
    return [str(first) if stop == first + 1 else f"{first}:{stop}" for first, stop in runs(numbers)]
