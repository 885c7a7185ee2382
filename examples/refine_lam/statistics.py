"""Intervals. Each function says what it resamples or takes as random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from examples.demo.probe import Probe, r2_interval

# 97.5 % quantiles of Student's t for 1 .. 10 degrees of freedom
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        freedom: degrees of freedom, >= 1.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964  # Cornish and Fisher's series, exact to 1e-3 from here on
    second, third = (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / (4 * freedom) + second / freedom**2 + third / freedom**3


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """A 95 % t interval of a mean over seeds, which are the random samples. (None, None) for fewer than two."""
    number = len(values)
    if number < 2:
        return None, None
    mean = sum(values) / number
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1) / number)
    half = t_quantile(number - 1) * spread
    return mean - half, mean + half


def values_of(rows: Sequence[Mapping[str, Any]], arm: str, measure: str, key: str) -> dict[int, float]:
    """Return one number for each seed, from the rows of one world."""
    return {row["seed"]: row[key] for row in rows if row["arm"] == arm and row["measure"] == measure}


def difference_interval(
    values: Mapping[int, float], others: Mapping[int, float]
) -> tuple[float | None, float | None, float | None]:
    """The mean of the differences, seed by seed, and its 95 % t interval over seeds.

    Args:
        values: by seed.
        others: by seed; only common seeds count.

    Returns:
        Mean, lower and upper end; None if there are too few seeds.
    """
    pairs = [values[seed] - others[seed] for seed in values if seed in others]
    if not pairs:
        return None, None, None
    return sum(pairs) / len(pairs), *interval_of_mean(pairs)


def over_demonstrations(
    rows: Sequence[Mapping[str, Any]], arm: str, measure: str, other: str | None = None
) -> tuple[float, float] | tuple[None, None]:
    """A 95 % bootstrap interval of R2, or of its difference to another arm; held-out demonstrations are resampled.

    For one seed only: it covers the choice of held-out demonstrations, not the variation over seeds.

    Args:
        rows: of one world.
        arm: name of the arm.
        measure: name of the measure.
        other: arm to subtract, on the same demonstrations.

    Returns:
        The 2.5 and 97.5 percentiles; (None, None) with more seeds, or for a measure without R2.
    """
    probes = []
    for name in (arm,) if other is None else (arm, other):
        matching = [row for row in rows if (row["arm"], row["measure"]) == (name, measure)]
        if len(matching) != 1 or "errors" not in matching[0]:
            return None, None
        errors, variances = (torch.tensor(matching[0][key], dtype=torch.double) for key in ("errors", "variances"))
        probes.append(Probe(matching[0]["r2"], errors, variances, penalty=0.0))
    return r2_interval(*probes)


def paired_bootstrap(
    rows: Sequence[Mapping[str, Any]], arm: str, other: str, measure: str, draws: int = 4000
) -> tuple[float, float]:
    """A 95 % bootstrap interval of a difference of success rates; starts are resampled for both policies together.

    Starts are resampled within each seed and task, seeds are not: the interval covers the episodes of these trained
    policies, not the variation over trainings.

    Args:
        rows: of one world.
        arm: name of the arm.
        other: arm to subtract.
        measure: name of the policy's measure.
        draws: number of resamplings.

    Returns:
        The 2.5 and 97.5 percentiles, in shares.
    """
    outcomes = {
        name: {row["seed"]: row["solved"] for row in rows if row["arm"] == name and row["measure"] == measure}
        for name in (arm, other)
    }
    random = torch.Generator().manual_seed(0)
    total, count = torch.zeros(draws), 0
    for seed in sorted(outcomes[arm].keys() & outcomes[other].keys()):
        for task, solved in sorted(outcomes[arm][seed].items()):
            gain = torch.tensor(solved, dtype=torch.float) - torch.tensor(
                outcomes[other][seed][task], dtype=torch.float
            )
            total += gain[torch.randint(len(gain), (draws, len(gain)), generator=random)].sum(1)
            count += len(gain)
    low, high = (total / count).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
