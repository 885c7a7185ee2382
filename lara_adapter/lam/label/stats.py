"""Statistics of new features, in the form that LeRobot keeps: per episode, and over the dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

__all__ = ["BASIC", "Stats", "aggregate", "describe", "known_statistics"]

BASIC = ("min", "max", "mean", "std", "count")
Stats = dict[str, list[float]]


def known_statistics(present: Collection[str]) -> list[str]:
    """The names among `present` that this module can compute, sorted; without any the five basic ones."""
    kinds = [kind for kind in present if kind in BASIC or _quantile(kind) is not None]
    return sorted(set(kinds)) or list(BASIC)


def describe(values: np.ndarray, kinds: Sequence[str]) -> Stats:
    """Statistics over the rows of [T, W]: name -> W numbers (one for "count"), as plain floats.

    Quantiles are exact here; LeRobot's own are read off a histogram.
    """
    values = values.astype(np.float64).reshape(len(values), -1)
    found: Stats = {}
    for kind in kinds:
        if kind == "count":
            found[kind] = [len(values)]
            continue
        share = _quantile(kind)
        result = np.quantile(values, share, axis=0) if share is not None else getattr(values, kind)(axis=0)
        found[kind] = result.tolist()
    return found


def aggregate(episodes: Sequence[Mapping[str, list[float]]], kinds: Sequence[str]) -> Stats:
    """The `kinds` of statistics of a dataset from those of its episodes, which need the BASIC ones too.

    As LeRobot aggregates them: a quantile is the mean of the episodes' quantiles, weighted by their frames.
    """
    parts = {kind: np.array([episode[kind] for episode in episodes]) for kind in {*BASIC, *kinds}}
    weight = parts["count"].reshape(-1, 1) / parts["count"].sum()
    mean = (parts["mean"] * weight).sum(0)
    variance = ((parts["std"] ** 2 + (parts["mean"] - mean) ** 2) * weight).sum(0)
    whole = {
        "min": parts["min"].min(0),
        "max": parts["max"].max(0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": parts["count"].sum(0),
    }
    return {kind: (whole[kind] if kind in whole else (parts[kind] * weight).sum(0)).tolist() for kind in kinds}


def _quantile(kind: str) -> float | None:
    """0.01 of "q01"; None for another name."""
    return int(kind[1:]) / 100 if len(kind) == 3 and kind[0] == "q" and kind[1:].isdigit() else None
