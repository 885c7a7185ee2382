"""Statistics of new features, in the form that LeRobot keeps: per episode, and over the dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

__all__ = ["BASIC", "Stats", "Total", "describe", "known_statistics"]

BASIC = ("min", "max", "mean", "std", "count")
Stats = dict[str, np.ndarray]  # name -> W numbers float64; "count": one int64


def known_statistics(present: Collection[str]) -> list[str]:
    """The names among `present` that this module can compute, sorted; without any the five basic ones."""
    kinds = [kind for kind in present if kind in BASIC or _quantile(kind) is not None]
    return sorted(set(kinds)) or list(BASIC)


def describe(values: np.ndarray, kinds: Sequence[str]) -> Stats:
    """Statistics over the rows of [T, W], T at least 1.

    Quantiles are exact here; LeRobot's own are read off a histogram.
    """
    values = values.astype(np.float64).reshape(len(values), -1)
    found: Stats = {}
    for kind in kinds:
        if kind == "count":
            found[kind] = np.array([len(values)])
            continue
        share = _quantile(kind)
        found[kind] = np.quantile(values, share, axis=0) if share is not None else getattr(values, kind)(axis=0)
    return found


class Total:
    """Statistics of a dataset from those of its episodes, which are added one by one and not kept.

    As LeRobot aggregates them: a quantile is the mean of the episodes' quantiles, weighted by their frames.
    """

    def __init__(self) -> None:
        self._parts: Stats = {}

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        """Add an episode; its statistics hold the BASIC ones."""
        new = dict(episode)
        if self._parts:
            old = self._parts
            count = old["count"] + new["count"]
            share = new["count"] / count
            mean = {kind: old[kind] + (new[kind] - old[kind]) * share for kind in new if kind not in BASIC[:2]}
            apart = (new["mean"] - old["mean"]) ** 2
            variance = old["std"] ** 2 * (1 - share) + new["std"] ** 2 * share + apart * share * (1 - share)
            new = {
                **mean,
                "min": np.minimum(old["min"], new["min"]),
                "max": np.maximum(old["max"], new["max"]),
                "std": np.sqrt(variance),
                "count": count,
            }
        self._parts = new

    def stats(self, kinds: Sequence[str]) -> Stats:
        """These statistics of all episodes together."""
        return {kind: self._parts[kind] for kind in kinds}


def _quantile(kind: str) -> float | None:
    """0.01 of "q01"; None for another name."""
    return int(kind[1:]) / 100 if len(kind) == 3 and kind[0] == "q" and kind[1:].isdigit() else None
