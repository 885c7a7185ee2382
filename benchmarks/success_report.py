"""Tables and a picture of benchmarks/success.py's rows.

    python benchmarks/success_report.py        # benchmarks/results/success/rows.jsonl -> summary.json, success.png

What is resampled: differences to another arm are paired over seeds. Their t interval has seeds - 1 degrees of freedom; the
bootstrap draws seeds, and within each seed and task episodes (the same episodes for both arms, which had the same starts).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lara_adapter.files import write_json  # noqa: E402

FOLDER = ROOT / "benchmarks" / "results" / "success"
PRIMARY = ("contrastive", "dit_only")
# two-sided 97.5 % quantiles of Student's t by degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Rows = dict[tuple[int, str], dict[str, Any]]  # by seed and arm, of one regime and one set of settings


def groups_of(rows: list[dict[str, Any]]) -> dict[str, Rows]:
    """Rows by regime and number of demonstrations; other settings must be one set within each."""
    groups: dict[str, Rows] = defaultdict(dict)
    seen: dict[str, Any] = {}
    for row in rows:
        name = f"{row['regime']}, {row['settings']['demos']} demonstrations"
        if seen.setdefault(name, row["settings"]) != row["settings"]:
            raise ValueError(f"rows of {name!r} have different settings; report them from separate files")
        groups[name][row["seed"], row["arm"]] = row
    return dict(groups)


def solved(row: dict[str, Any]) -> np.ndarray:
    """[tasks, episodes] of 0 and 1."""
    return np.array([[int(x) for x in outcome] for outcome in row["solved"].values()])


def t_interval(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of a mean over seeds; None for one seed, which says nothing of its spread."""
    if len(values) < 2:
        return None
    quantile = _T[len(values) - 2] if len(values) - 2 < len(_T) else 2.0
    half = quantile * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def bootstrap(first: list[np.ndarray], second: list[np.ndarray], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the paired difference in success, over seeds and episodes."""
    random = np.random.default_rng(0)
    values = np.empty(draws)
    for draw in range(draws):
        total = 0.0
        for seed in random.integers(len(first), size=len(first)):
            a, b = first[seed], second[seed]
            episodes = random.integers(a.shape[1], size=a.shape)
            total += float((np.take_along_axis(a, episodes, 1) - np.take_along_axis(b, episodes, 1)).mean())
        values[draw] = total / len(first)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def compare(rows: Rows, arm: str, base: str, value: Callable[[dict[str, Any]], float | None]) -> dict[str, Any] | None:
    """The paired difference of a number between two arms, over the seeds that have both."""
    pairs = []
    for seed in sorted({seed for seed, _ in rows}):
        if (seed, arm) in rows and (seed, base) in rows:
            a, b = value(rows[seed, arm]), value(rows[seed, base])
            if a is not None and b is not None:
                pairs.append(a - b)
    if not pairs:
        return None
    return {"mean": mean(pairs), "t": t_interval(pairs), "seeds": len(pairs)}


def success_of(row: dict[str, Any]) -> float | None:
    """Success rate, mean over tasks."""
    return float(solved(row).mean()) if "solved" in row else None


def probe_of(row: dict[str, Any]) -> float | None:
    """R^2 of the linear probe of its LAM."""
    return row["lam"]["r2"] if "lam" in row else None


def error_of(row: dict[str, Any]) -> float | None:
    """Held-out action error."""
    return row.get("action_error")


def summarise(rows: Rows) -> dict[str, Any]:
    """Per arm: means over seeds, and differences to the DiT-only policy (success, error) and to the control (probe)."""
    summary = {}
    for arm in dict.fromkeys(arm for _, arm in rows):
        own = [row for (_, name), row in sorted(rows.items()) if name == arm]
        entry: dict[str, Any] = {"seeds": len(own)}
        if "solved" in own[0]:
            entry["success"] = mean(success_of(row) for row in own)  # type: ignore[type-var, misc]
            entry["episodes"] = int(sum(solved(row).size for row in own))
            entry["action_error"] = mean(row["action_error"] for row in own)
        if "lam" in own[0]:
            for key in ("r2", "codes_used", "mean_direction", "reconstruction_over_copy"):
                entry[key] = mean(row["lam"][key] for row in own)
        if arm != "dit_only" and "solved" in own[0]:
            difference = compare(rows, arm, "dit_only", success_of)
            if difference:
                seeds = [seed for seed, name in rows if name == arm and (seed, "dit_only") in rows]
                interval = bootstrap(
                    [solved(rows[seed, arm]) for seed in seeds], [solved(rows[seed, "dit_only"]) for seed in seeds]
                )
                entry["success_gain"] = {**difference, "bootstrap": interval}
            entry["error_gain"] = compare(rows, arm, "dit_only", error_of)
        if arm not in ("before", "control", "dit_only") and "lam" in own[0]:
            entry["probe_gain"] = compare(rows, arm, "control", probe_of)
        summary[arm] = entry
    return summary


def _gain(gain: dict[str, Any] | None, scale: float, digits: int) -> str:
    if gain is None:
        return ""
    text = f"{scale * gain['mean']:+.{digits}f}"
    return text if gain["t"] is None else f"{text} ({_range(gain['t'], scale, digits)})"


def _range(interval: tuple[float, float], scale: float, digits: int) -> str:
    return " to ".join(f"{scale * end:+.{digits}f}" for end in interval)


def table(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    head = (
        "arm", "seeds", "success", "gain over dit_only, points (t, 95 %)", "bootstrap", "action error", "probe R2",
        "over control (t, 95 %)", "codes", "mean direction",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, entry in summary.items():
        gain = entry.get("success_gain")
        cells = [
            arm,
            str(entry["seeds"]),
            f"{100 * entry['success']:.1f} %" if "success" in entry else "",
            _gain(gain, 100, 1),
            _range(gain["bootstrap"], 100, 1) if gain else "",
            f"{entry['action_error']:.4f}" if "action_error" in entry else "",
            f"{entry['r2']:.2f}" if "r2" in entry else "",
            _gain(entry.get("probe_gain"), 1, 2),
            f"{entry['codes_used']:.0f}" if "codes_used" in entry else "",
            f"{entry['mean_direction']:.2f}" if "mean_direction" in entry else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def power(rows: Rows) -> str:
    """What difference this many seeds could have shown."""
    arm, base = PRIMARY
    pairs = [
        success_of(rows[seed, arm]) - success_of(rows[seed, base])  # type: ignore[operator]
        for seed in {seed for seed, _ in rows}
        if (seed, arm) in rows and (seed, base) in rows
    ]
    if len(pairs) < 2:
        return "one seed: no interval"
    quantile = _T[min(len(pairs) - 2, len(_T) - 1)]
    found = (quantile + 0.84) * stdev(pairs) / math.sqrt(len(pairs))
    return (
        f"paired differences of {arm} over {base} spread by {100 * stdev(pairs):.1f} points (SD of {len(pairs)} seeds): "
        f"a true difference of {100 * found:.0f} points would be found with 80 % probability"
    )


def picture(groups: dict[str, dict[str, Any]], path: Path) -> None:
    """Gain in success and in the probe, with t intervals, per regime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 0.6 + 2.7 * len(groups)), squeeze=False, sharex="col")
    for row, (name, summary) in zip(axes, groups.items()):
        for axis, key, scale, title in (
            (row[0], "success_gain", 100, "success over DiT-only, points"),
            (row[1], "probe_gain", 1, "probe R2 over the control LAM"),
        ):
            arms = [arm for arm, entry in summary.items() if entry.get(key)]
            for height, arm in enumerate(reversed(arms)):
                gain = summary[arm][key]
                if gain["t"]:
                    axis.plot([scale * end for end in gain["t"]], [height, height], color="C0", lw=2)
                axis.plot(scale * gain["mean"], height, "o", color="C0")
            axis.set_yticks(range(len(arms)), list(reversed(arms)))
            axis.axvline(0, color="0.6", lw=1)
            seeds = max((entry["seeds"] for entry in summary.values()), default=0)
            axis.set_title(f"{name}, {seeds} seeds: {title}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Read, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=FOLDER / "rows.jsonl")
    parser.add_argument("--out", type=Path, help="folder of summary.json and success.png; default: beside the rows")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines() if line.endswith("}")]
    groups = groups_of(rows)
    summaries = {name: summarise(group) for name, group in groups.items()}
    out = arguments.out or arguments.rows.parent
    write_json(out / "summary.json", summaries)
    picture(summaries, out / "success.png")
    for name, summary in summaries.items():
        print(f"### {name}\n\n{table(summary)}\n\n{power(groups[name])}\n")
    print(f"written: {out}/summary.json, {out}/success.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
