"""What `reconstruct` does to a latent action model: each way to train one, with all pairs reconstructed and with a part.

    pip install -e ".[demo,train]"
    python -m benchmarks.success.reconstruct             # resumable; rows are appended as they come
    python -m benchmarks.success.reconstruct --table     # of the rows that are there

The demo's experiment, settings and measures; every seed makes everything anew: starts, demonstrations, play video, weights.
Within a seed all share data, order and initial weights, and what is joint or a control starts from the same LAM, which
learnt from the video with all pairs reconstructed. No policy acts: the question is what the LAM becomes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from benchmarks import RESULTS, markdown
from benchmarks.success.arms import CONTRASTIVE, W
from benchmarks.success.jobs import open_stages, record
from benchmarks.success.report import Rows, compare, gain
from benchmarks.success.rows import Row, append_row, environment, read_numbers, read_rows
from examples.demo.probe import examine_lam
from examples.demo.settings import Experiment
from examples.demo.stages import Job
from examples.demo.train import continue_lam, pretrain_lam, train_policy
from examples.metaworld_sim import find_gl
from lara_adapter.storage.files import read_json

ROWS = RESULTS / "reconstruct.jsonl"
JOINT: dict[str, dict[str, Any]] = {"contrastive": CONTRASTIVE, "cosine": W}  # w1 = w2 = 0.1, as in the demo
NOTICEABLE = 0.02  # of the probe's R2
TRAININGS = {
    "contrastive": "joint, contrastive",
    "cosine": "joint, cosine",
    "control": "as many steps without alignment",
    "video": "from video alone",
}


@dataclasses.dataclass(frozen=True)
class Settings(Experiment):
    """Settings of the study. Rows of the same settings are never measured twice."""

    workers: int = 1
    """Parallel processes, one thread each."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each is the whole experiment anew."""
    shares: tuple[float, ...] = (1.0, 0.25)
    """Parts of the pairs that are reconstructed."""
    trainings: tuple[str, ...] = tuple(TRAININGS)
    """Ways to train a LAM: contrastive, cosine, control, video."""
    cache: Path = Path("outputs/reconstruct")
    """Folder of finished jobs."""
    rows: Path = ROWS
    """File that the rows are added to."""
    table: bool = False
    """Only print what is there."""

    def same(self) -> dict[str, Any]:
        """The settings that a row depends on, beside its seed, training and share."""
        left_out = (
            "workers", "seeds", "shares", "trainings", "cache", "rows", "table", "episodes", "max_steps",
        )  # fmt: skip
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def arm(training: str, share: float) -> str:
    """Name of a row among those of a seed."""
    return f"{training} {share:g}"


def run_seed(s: Settings, seed: int, there: set[str]) -> None:
    """Measure what is missing of a seed."""
    world = {"distractors": True, "seed": seed}
    training = {**world, "batch": s.batch, "lr": s.lr}
    stage = open_stages(str(seed), s.cache, s.workers)
    data = record(s, seed, stage)

    def job(kind: str, share: float, lam: Path | None) -> Job:
        part = {} if share == 1 else {"reconstruct": share}
        if kind == "video":
            return Job(
                "lam-before", pretrain_lam, {"data": data, "steps": s.lam_steps, **training, **part}, s.lam_steps
            )
        given = {"data": data, "lam": lam, "steps": s.policy_steps, **training}
        if kind == "control":
            return Job("lam-control", continue_lam, {**given, **part}, s.policy_steps)
        options = {"lara_options": {**JOINT[kind], **part}, "execute": s.execute}
        return Job(f"policy-{kind}", train_policy, {**given, **options}, s.policy_steps)

    before = stage("LAM", [job("video", 1.0, None)])[0] / "lam"
    for kind in s.trainings:
        for share in s.shares:
            name = arm(kind, share)
            if name in there:
                continue
            trained = stage(name, [job(kind, share, before)])[0]
            examining = {"data": data, "shown": 1, **world, "lam": trained / "lam"}
            measured = stage("probe", [Job(f"probe-{kind}", examine_lam, examining, 1)])[0] / "measured.json"
            row: Row = {
                "seed": seed, "training": kind, "reconstruct": share, "settings": s.same(),
                "lam": read_numbers(measured), "environment": environment("metaworld", "mujoco"),
            }  # fmt: skip
            if kind in JOINT:
                row["action_error"] = read_json(trained / "action_error.json")["action_error"]
            append_row(s.rows, row)


def by_arm(rows: list[Row]) -> Rows:
    """Rows by seed and arm.

    Raises:
        ValueError: they have different settings.
    """
    if len({json.dumps(row["settings"], sort_keys=True) for row in rows}) > 1:
        raise ValueError("rows have different settings; this page does not mix them")
    return {(row["seed"], arm(row["training"], row["reconstruct"])): row for row in rows}


def change(rows: Rows, training: str, share: float, key: str) -> dict[str, Any] | None:
    """What a share does to a number of the LAM, over the seeds that have both it and all pairs."""
    return compare(rows, arm(training, share), arm(training, 1.0), lambda row: row["lam"][key])


def table(rows: Rows) -> str:
    """The study in Markdown: means over seeds, and differences to all pairs, paired."""
    if not rows:
        return "Not measured yet."
    lines = []
    for training, title in TRAININGS.items():
        shares = sorted({row["reconstruct"] for row in rows.values() if row["training"] == training}, reverse=True)
        for share in shares:
            own = [row for (_, name), row in sorted(rows.items()) if name == arm(training, share)]

            def average(key: str, digits: int, own: list[Row] = own) -> str:
                return f"{mean(row['lam'][key] for row in own):.{digits}f}"

            def over(key: str, digits: int, training: str = training, share: float = share) -> str:
                return "" if share == 1 else gain(change(rows, training, share, key), 1, digits)

            errors = compare(rows, arm(training, share), arm(training, 1.0), lambda row: row.get("action_error"))
            lines.append([
                title, f"{share:.0%}", str(len(own)), average("r2", 3), over("r2", 3),
                average("reconstruction_over_copy", 3), over("reconstruction_over_copy", 3), average("codes_used", 0),
                average("perplexity", 0), average("mean_direction", 2), "" if share == 1 else gain(errors, 1, 4),
            ])  # fmt: skip
    head = (
        "the LAM was trained", "pairs reconstructed", "seeds", "probe R2", "change (t, 95 %)", "reconstruction / copy",
        "change (t, 95 %)", "codes", "perplexity", "mean direction", "action error, change",
    )  # fmt: skip
    return markdown.table(head, lines)


def reading(rows: Rows) -> str:
    """What the rows say of a quarter against all pairs, and the recommendation, which needs all seeds of every training."""
    planned, found, harmless = len(Settings.seeds), [], []
    fewest = planned
    for training, title in TRAININGS.items():
        r2 = change(rows, training, 0.25, "r2")
        fewest = min(fewest, r2["seeds"] if r2 else 0)
        if r2 is None:
            continue
        picture = gain(change(rows, training, 0.25, "reconstruction_over_copy"), 1, 3)
        found.append(
            f"{title} ({r2['seeds']} of {planned} seeds): R2 {gain(r2, 1, 3)}, reconstruction / copy {picture}"
        )
        if r2["t"] is not None and r2["mean"] > -NOTICEABLE and r2["t"][1] > 0:
            harmless.append(title)
    if not found:
        return ""
    if fewest < planned:
        advice = (
            "The study is not finished, and one seed says little: until it is, keep 1.0, the default, unless the cost of a "
            "step decides; then take 0.25, and look at the LAM with `lara health`."
        )
    elif harmless:
        advice = f"Recommended: 0.25 where the LAM is trained {'; '.join(harmless)}; 1.0 otherwise."
    else:
        advice = "Recommended: 1.0."
    return markdown.paragraph(f"A quarter against all pairs: {'; '.join(found)}. {advice}")


def section() -> str:
    """The committed rows in Markdown, and their reading."""
    rows = by_arm(read_rows(ROWS))
    return "\n\n".join(part for part in (table(rows), reading(rows)) if part)


SECTIONS = {"benchmarks/README.md": {"reconstruct": section}}


def main() -> int:
    """Run what is missing, and print."""
    settings = tyro.cli(Settings, description=__doc__)
    settings = dataclasses.replace(settings, cache=settings.cache.resolve())
    unknown = set(settings.trainings) - set(TRAININGS)
    if unknown:
        sys.stderr.write(f"--trainings: unknown {', '.join(sorted(unknown))}; expected {', '.join(TRAININGS)}\n")
        return 2

    def measured() -> list[Row]:
        return [row for row in read_rows(settings.rows) if row["settings"] == settings.same()]

    if not settings.table:
        find_gl()
        for seed in settings.seeds:
            run_seed(settings, seed, {name for own, name in by_arm(measured()) if own == seed})
    print(table(by_arm(measured())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
