"""Tables and pictures of the success rows.

    python -m benchmarks.success.report        # results/success/rows.jsonl -> summary.json, success.png, ablations.png

What is resampled: differences to another arm are paired over seeds. Their t interval has seeds - 1 degrees of freedom; the
bootstrap draws seeds, and within each seed and task episodes (the same episodes for both arms, which had the same starts).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks import markdown
from benchmarks.success import pictures
from benchmarks.success.arms import ARMS, BASE, CONTROL, DEFAULTS, STAGES
from benchmarks.success.rows import CONFIRM, ROWS, Row, read_rows
from lara_adapter.storage.files import read_json, write_json

PRIMARY = ("contrastive", "dit_only")
# two-sided 97.5 % quantiles of Student's t by degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

ORDER = ("before", CONTROL, *ARMS)  # of the tables, in whatever order rows came
Rows = dict[tuple[int, str], Row]  # by seed and arm, of one regime and one set of settings


def group_rows(rows: list[Row]) -> dict[str, Rows]:
    """Rows by regime, tasks, demonstrations and size of the policy; other settings must be one set within each."""
    groups: dict[str, Rows] = defaultdict(dict)
    seen: dict[str, Any] = {}
    for row in rows:
        settings = row["settings"]
        name = f"{row['regime']}, {len(settings['tasks'])} tasks, {settings['demos']} demonstrations each"
        size = [f"{key} {settings[key]}" for key in ("width", "depth") if key in settings]
        if size:
            name += f", a policy of {' and '.join(size)}"
        if seen.setdefault(name, settings) != settings:
            raise ValueError(f"rows of {name!r} have different settings; this page does not mix them")
        groups[name][row["seed"], row["arm"]] = row
    return dict(groups)


def read_groups(path: Path) -> dict[str, Rows]:
    """The groups of a file of rows, and separately those of its confirmation, if it has one."""
    confirmed = group_rows(read_rows(path.with_name(CONFIRM)))
    return group_rows(read_rows(path)) | {f"{name}, confirmation": rows for name, rows in confirmed.items()}


def solved(row: Row) -> np.ndarray:
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
    difference = np.stack(first) - np.stack(second)  # [seeds, tasks, episodes]
    values = np.empty(draws)
    for draw in range(draws):
        seeds = difference[random.integers(len(first), size=len(first))]
        episodes = random.integers(seeds.shape[-1], size=seeds.shape)
        values[draw] = sum(np.take_along_axis(seeds, episodes, -1).mean((1, 2)).tolist()) / len(first)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def differences(rows: Rows, arm: str, base: str, value: Callable[[Row], float | None]) -> list[float]:
    """A number of one arm minus that of another, of each seed that has both."""
    pairs = []
    for seed in sorted({seed for seed, _ in rows}):
        if (seed, arm) in rows and (seed, base) in rows:
            a, b = value(rows[seed, arm]), value(rows[seed, base])
            if a is not None and b is not None:
                pairs.append(a - b)
    return pairs


def compare(rows: Rows, arm: str, base: str, value: Callable[[Row], float | None]) -> dict[str, Any] | None:
    """The paired difference of a number between two arms, over the seeds that have both."""
    pairs = differences(rows, arm, base, value)
    if not pairs:
        return None
    return {"mean": mean(pairs), "t": t_interval(pairs), "seeds": len(pairs)}


def success_rate(row: Row) -> float | None:
    """Success rate, mean over tasks."""
    return float(solved(row).mean()) if "solved" in row else None


def probe_r2(row: Row) -> float | None:
    """R^2 of the linear probe of its LAM."""
    return row["lam"]["r2"] if "lam" in row else None


def held_out_error(row: Row) -> float | None:
    """Held-out action error."""
    return row.get("action_error")


def summarise(rows: Rows) -> dict[str, Any]:
    """Per arm: means over seeds, and differences to the DiT-only policy (success, error) and to the control (probe)."""
    summary = {}
    there = {arm for _, arm in rows}
    for arm in (name for name in ORDER if name in there):
        own = [row for (_, name), row in sorted(rows.items()) if name == arm]
        entry: dict[str, Any] = {"seeds": len(own)}
        if "action_error" in own[0]:
            acted = [row for row in own if "solved" in row]  # seeds may be there for their LAM alone
            if len(acted) < len(own):
                entry["acted"] = len(acted)
            entry["success"] = mean(success_rate(row) for row in acted)  # type: ignore[type-var, misc]
            entry["episodes"] = int(sum(solved(row).size for row in acted))
            entry["action_error"] = mean(row["action_error"] for row in own)
        if "lam" in own[0]:
            for key in ("r2", "codes_used", "mean_direction", "reconstruction_over_copy"):
                entry[key] = mean(row["lam"][key] for row in own)
        if arm != "dit_only" and "action_error" in own[0]:
            difference = compare(rows, arm, "dit_only", success_rate)
            if difference:
                seeds = [seed for seed, name in rows if name == arm and "solved" in rows.get((seed, "dit_only"), {})]
                interval = bootstrap(
                    [solved(rows[seed, arm]) for seed in seeds], [solved(rows[seed, "dit_only"]) for seed in seeds]
                )
                entry["success_gain"] = {**difference, "bootstrap": interval}
            entry["error_gain"] = compare(rows, arm, "dit_only", held_out_error)
        if arm not in ("before", CONTROL, "dit_only") and "lam" in own[0]:
            entry["probe_gain"] = compare(rows, arm, CONTROL, probe_r2)
        if is_ablation(arm):
            base = "cosine" if arm in STAGES["cosine_depth"] else BASE
            measures = {"success": success_rate, "action_error": held_out_error, "r2": probe_r2}
            entry["change"] = {name: compare(rows, arm, base, measure) for name, measure in measures.items()}
        summary[arm] = entry
    return summary


def is_ablation(arm: str) -> bool:
    """Whether an arm is a change of one knob."""
    return arm in STAGES["ablations"] or arm in STAGES["cosine_depth"]


def ablation_points(rows: Rows) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Measure -> knob -> value -> numbers of the seeds that have every arm of that knob and the unchanged one."""
    measures = {"probe R2": probe_r2, "action error": held_out_error, "success": success_rate}
    points: dict[str, dict[str, dict[str, list[float]]]] = {name: defaultdict(dict) for name in measures}
    for knob in (*DEFAULTS, "cosine, layer"):
        base = "cosine" if knob == "cosine, layer" else BASE
        default = DEFAULTS[knob.removeprefix("cosine, ")]
        arms = {default: base, **{arm.rpartition("=")[2]: arm for arm in ARMS if arm.rpartition("=")[0] == knob}}
        seeds = sorted(set.intersection(*({seed for seed, name in rows if name == arm} for arm in arms.values())))
        for name, measure in measures.items():
            for value, arm in arms.items() if seeds else ():
                points[name][knob][value] = [measure(rows[seed, arm]) for seed in seeds]  # type: ignore[misc]
    return {name: dict(found) for name, found in points.items()}


def references(rows: Rows) -> dict[str, float]:
    """What needs no LARA, over the seeds that have all ablations: DiT-only policies, and the control LAM."""
    arms = {arm for _, arm in rows if is_ablation(arm)}
    seeds = set.intersection(*({seed for seed, name in rows if name == arm} for arm in arms)) if arms else set()
    policy = [rows[seed, "dit_only"] for seed in seeds if (seed, "dit_only") in rows]
    lam = [rows[seed, CONTROL] for seed in seeds if (seed, CONTROL) in rows]
    found = {
        "probe R2": [probe_r2(row) for row in lam],
        "action error": [held_out_error(row) for row in policy],
        "success": [success_rate(row) for row in policy],
    }
    return {name: mean(values) for name, values in found.items() if values}  # type: ignore[type-var, misc]


def gain(difference: dict[str, Any] | None, scale: float, digits: int) -> str:
    """A difference with its t interval, as text."""
    if difference is None:
        return ""
    text = f"{scale * difference['mean']:+.{digits}f}"
    return text if difference["t"] is None else f"{text} ({_range(difference['t'], scale, digits)})"


def _range(interval: tuple[float, float], scale: float, digits: int) -> str:
    return " to ".join(f"{scale * end:+.{digits}f}" for end in interval)


def ablation_table(summary: dict[str, Any]) -> str:
    """The ablations in Markdown, each against the arm that it changes, all else equal; empty where there are none."""
    rows = []
    for arm, entry in summary.items():
        change = entry.get("change")
        if change and change["action_error"]:
            rows.append(
                [
                    arm,
                    str(change["action_error"]["seeds"]),
                    gain(change["r2"], 1, 2),
                    gain(change["action_error"], 1, 4),
                    gain(change["success"], 100, 1),
                ]
            )
    head = ("changed", "seeds", "probe R2, change (t, 95 %)", "action error, change", "success, points")
    return markdown.table(head, rows) if rows else ""


def table(summary: dict[str, Any]) -> str:
    """The main arms in Markdown."""
    head = (
        "arm", "seeds", "success", "gain over dit_only, points (t, 95 %)", "bootstrap", "action error",
        "over dit_only (t, 95 %)", "probe R2", "over control (t, 95 %)", "codes", "mean direction",
    )  # fmt: skip
    rows = []
    for arm, entry in summary.items():
        if is_ablation(arm):
            continue
        difference = entry.get("success_gain")
        cells = [
            arm,
            f"{entry['acted']} of {entry['seeds']}" if "acted" in entry else str(entry["seeds"]),
            f"{100 * entry['success']:.1f} %" if "success" in entry else "",
            gain(difference, 100, 1),
            _range(difference["bootstrap"], 100, 1) if difference else "",
            f"{entry['action_error']:.4f}" if "action_error" in entry else "",
            gain(entry.get("error_gain"), 1, 4),
            f"{entry['r2']:.2f}" if "r2" in entry else "",
            gain(entry.get("probe_gain"), 1, 2),
            f"{entry['codes_used']:.0f}" if "codes_used" in entry else "",
            f"{entry['mean_direction']:.2f}" if "mean_direction" in entry else "",
        ]
        rows.append(cells)
    return markdown.table(head, rows)


def power(rows: Rows) -> str:
    """What difference this many seeds could have shown."""
    arm, base = PRIMARY
    pairs = differences(rows, arm, base, success_rate)
    if len(pairs) < 2:
        return "One seed: no interval."
    quantile = _T[min(len(pairs) - 2, len(_T) - 1)]
    found = (quantile + 0.84) * stdev(pairs) / math.sqrt(len(pairs))
    return (
        f"Paired differences of {arm} over {base} spread by {100 * stdev(pairs):.1f} points (SD of {len(pairs)} seeds): "
        f"a true difference of {100 * found:.0f} points would be found with 80 % probability."
    )


@functools.cache
def recorded() -> dict[str, tuple[Rows, dict[str, Any]]]:
    """The committed groups of rows with their summaries."""
    return {name: (rows, summarise(rows)) for name, rows in read_groups(ROWS).items()}


def success_section() -> str:
    """Tables of the main arms, one for each group of rows, and what difference they could have shown."""
    return "\n\n".join(
        f"**{name[0].upper()}{name[1:]}**\n\n{table(summary)}\n\n{power(rows)}"
        for name, (rows, summary) in recorded().items()
    )


def ablations_section() -> str:
    """Tables of the ablations."""
    tables = {name: ablation_table(summary) for name, (_, summary) in recorded().items()}
    return "\n\n".join(f"{name}:\n\n{text}" for name, text in tables.items() if text)


SECTIONS = {"benchmarks/README.md": {"success": success_section, "ablations": ablations_section}}


def doubtful_rows(path: Path) -> Iterator[str]:
    """What is wrong with the rows of a file."""
    rows = read_rows(path)
    keys = {json.dumps([row["regime"], row["seed"], row["arm"], row["settings"]], sort_keys=True) for row in rows}
    if len(keys) < len(rows):
        yield f"{path.name} has a row twice"
    for row in rows:
        episodes = {len(outcome) for outcome in row.get("solved", {}).values()}
        if episodes - {row["settings"]["episodes"]} or set("".join(row.get("solved", {}).values())) - {"0", "1"}:
            yield f"{path.name}: seed {row['seed']}, {row['arm']}: not the episodes of its settings"


def problems() -> Iterator[str]:
    """Rows that are not comparable, and a summary that does not follow from them."""
    from PIL import Image

    yield from doubtful_rows(ROWS)
    summaries = json.loads(json.dumps({name: summary for name, (_, summary) in recorded().items()}))
    if read_json(ROWS.with_name("summary.json")) != summaries:
        yield "summary.json does not follow from the rows: python -m benchmarks.success.report"
    sources = {"success.png": pictures.digest(summaries)}
    for group, summary in recorded().values():
        if ablation_table(summary):
            sources["ablations.png"] = pictures.digest([ablation_points(group), references(group)])
    for name, source in sources.items():
        with Image.open(ROWS.with_name(name)) as picture:
            if picture.info.get("Source") != source:
                yield f"{name} does not follow from the rows: python -m benchmarks.success.report"


def write(rows: Path, out: Path) -> None:
    """Write summary.json and the pictures of a file of rows."""
    groups = read_groups(rows)
    summaries = {name: summarise(group) for name, group in groups.items()}
    write_json(out / "summary.json", summaries)
    pictures.gains(summaries, (*STAGES["main"], *STAGES["gradient"]), out / "success.png")
    for name, summary in summaries.items():
        print(f"### {name}\n\n{table(summary)}\n\n{power(groups[name])}\n")
        if changed := ablation_table(summary):
            print(f"{changed}\n")
            pictures.ablations(ablation_points(groups[name]), references(groups[name]), out / "ablations.png")
    print(f"written: summary.json and pictures in {out}")


def main() -> int:
    """Read, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, help="folder of summary.json and pictures; default: beside the rows")
    arguments = parser.parse_args()
    if not read_rows(arguments.rows):
        sys.stderr.write(f"{arguments.rows} has no rows: run python -m benchmarks.success first\n")
        return 1
    write(arguments.rows, arguments.out or arguments.rows.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
