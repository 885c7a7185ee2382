"""What a process found in the stretches of a collection that is indexed while it is trained on, a line for each.

A run that goes on knows from it how many pairs the stretches it has passed had, and which sources of the one it is in
gave nothing. The main process reads those of all processes for `videos.json`; they never have to wait for each other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .faults import Fault

__all__ = ["Entry", "Journal"]


class Entry(NamedTuple):
    """What was found in one stretch."""

    epoch: int
    stretch: int  # its number in the epoch
    sources: int  # in it
    usable: int  # of these, with pairs
    pairs: int  # of this process, to train on
    counts: dict[str, int]  # as in :data:`~lara_adapter.data.index.COUNTS`
    faults: list[Fault]
    without: list[int]  # numbers of the sources that could not be scanned
    turned: dict[str, int]  # sources that their files say to turn, by how


class Journal:
    """The file of one process.

    Args:
        folder: where it is; it exists.
        name: of the collection and the settings.
        rank: number of the process.
        ranks: how many there are.
    """

    def __init__(self, folder: Path, name: str, rank: int, ranks: int) -> None:
        self.path = folder / f"ahead-{name}-{rank}-of-{ranks}.jsonl"
        self._all = [folder / f"ahead-{name}-{other}-of-{ranks}.jsonl" for other in range(ranks)]
        self._entries = {(entry.epoch, entry.stretch): entry for entry in _read(self.path)}

    def clear(self) -> None:
        """Forget everything: the run begins."""
        self.path.unlink(missing_ok=True)
        self._entries.clear()

    def get(self, epoch: int, stretch: int) -> Entry | None:
        """What was found in a stretch; None: nothing yet."""
        return self._entries.get((epoch, stretch))

    def add(self, entry: Entry) -> None:
        """Note what was found, before any of it is trained on."""
        self._entries[entry.epoch, entry.stretch] = entry
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry._asdict()) + "\n")

    def report(self, sources: int, names: Sequence[str]) -> dict[str, Any]:
        """The report of :class:`~lara_adapter.data.index.VideoIndex` as far as it is known, of all processes.

        Args:
            sources: how many there are.
            names: of the counts.
        """
        counts = dict.fromkeys(("scanned", "usable", *names), 0)
        faults: dict[tuple[str, str], Fault] = {}
        turned: Counter[str] = Counter()
        for path in self._all:
            for entry in _read(path):
                if entry.epoch == 0:  # in which each source is met once
                    for name, value in {"scanned": entry.sources, "usable": entry.usable, **entry.counts}.items():
                        counts[name] += value
                    turned.update(entry.turned)
                faults.update({(fault["file"], fault["what"]): fault for fault in entry.faults})
        about = {"turned": dict(turned)} if turned else {}
        return {"index": "ahead", "sources": sources, **counts, **about, "faults": list(faults.values())}


def _read(path: Path) -> Iterator[Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield Entry(**json.loads(line))
        except (ValueError, TypeError):  # the process was killed while it wrote
            continue
