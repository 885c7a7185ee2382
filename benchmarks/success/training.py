"""How much motion a LAM holds by how it is trained on video: longer, and with a few demonstrations whose actions are known.

    pip install -e ".[demo,train]"
    python -m benchmarks.success.training             # resumable; rows are appended as they come
    python -m benchmarks.success.training --table     # of the rows that are there

The demo's play video, tiny LAM and batch; measured as by `benchmarks.success.motion`, on play that no LAM learnt from, by
the hand's displacement in 16 steps:

- short: 600 steps at 5e-4, the LAM of the demo and of the other studies;
- long: 3600 steps at 1e-3;
- augmented: like long, and the inverse dynamics model sees random squares and light (`--augment`);
- labelled: like augmented, and the mean actions of five demonstrations a task have to be read off z (`--actions`);
- subtracted: like augmented, and z of (I_t, I_t) is subtracted from z (`subtract_still`): a still pair says nothing;
- subtracted_labelled: both;
- vit_short, vit: like short and augmented, on a frozen ViT with random weights in place of the LAM's own encoder.

The squares and the light are of the kind that the distractors are: other ones may ask for other augmentation.

Fixed before the first row, after runs with seed 100, which is not reported: these arms, five seeds that nothing was chosen
on, and what is aimed at: of the ceiling beyond the present frame with distractors 0.6 without labels and 0.8 with, and
all of it without distractors; a still pair explains at most a tenth of what the pair does. Four came later, fixed before
their rows: the two subtracted ones, aimed at the same, beside augmented and labelled (of two ways to subtract, after and
before the LayerNorm of z, the first was the better on seed 100 and 1800 steps: 0.45 of the ceiling against 0.36); and the
two with a ViT, three seeds with distractors, 0.6 aimed at.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import RESULTS, markdown
from benchmarks.success import motion_report
from benchmarks.success.jobs import Stage, measure_motions, open_stages, random_vit, record, run_missing
from benchmarks.success.rows import Row, read_rows
from examples.demo.settings import Experiment
from examples.demo.stages import Job
from examples.demo.train import pretrain_lam

ROWS = RESULTS / "success" / "training.jsonl"
ARMS = ("short", "long", "augmented", "labelled")
VIT = 96  # width of its tokens
AIMS = {"distractors": (0.6, 0.8), "clean": (1.0, 1.0)}  # without labels, with them
LATER = ("subtracted", "subtracted_labelled", "vit_short", "vit")


@dataclasses.dataclass(frozen=True)
class Settings(Experiment):
    """Settings of the study. Rows of the same settings are never measured twice."""

    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    """Each is the whole experiment anew."""
    regimes: tuple[Literal["clean", "distractors"], ...] = ("distractors", "clean")
    """Whether every frame gets random squares and light."""
    arms: tuple[
        Literal["short", "long", "augmented", "labelled", "subtracted", "subtracted_labelled", "vit_short", "vit"], ...
    ] = ARMS
    """Ways to train."""
    long_steps: int = 3600
    """Training steps of the others than the short one."""
    long_lr: float = 1e-3
    """Their peak learning rate."""
    labelled: int = 5
    """Demonstrations per task whose actions are known."""
    heldout_play: int = 40
    """Episodes of play per task to measure on."""
    folds: int = 5
    """Of episodes, each predicted by what was trained on the others."""
    cache: Path = Path("outputs/success")
    """Folder of finished jobs."""
    rows: Path = ROWS
    """File that the rows are added to."""
    table: bool = False
    """Only print what is there."""

    def same(self) -> dict[str, Any]:
        """The settings that a row depends on, beside its regime, seed and arm."""
        left_out = (
            "seeds", "regimes", "arms", "workers", "cache", "rows", "table", "episodes", "max_steps", "execute",
            "policy_steps",
        )  # fmt: skip
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def pretraining(self, arm: str, vit: Path | None = None) -> dict[str, Any]:
        """Arguments of `pretrain_lam` that make an arm; `vit` is the folder of the frozen ViT."""
        short = {"steps": self.lam_steps, "lr": self.lr}
        long = {"steps": self.long_steps, "lr": self.long_lr}
        augmented = {**long, "augmented": True}
        labelled = {**augmented, "labelled": self.labelled}
        arms: dict[str, dict[str, Any]] = {
            "short": short,
            "long": long,
            "augmented": augmented,
            "labelled": labelled,
            "subtracted": {**augmented, "subtracted": True},
            "subtracted_labelled": {**labelled, "subtracted": True},
            "vit_short": {**short, "encoder": vit},
            "vit": {**augmented, "encoder": vit},
        }
        return arms[arm]


def run_seed(s: Settings, regime: str, seed: int, arms: list[str]) -> list[Row]:
    """Train and measure one seed in one regime; returns a row for each arm."""
    world = {"distractors": regime == "distractors", "seed": seed}
    stage = open_stages(f"{regime} {seed}", s.cache, s.workers)
    given = {"data": record(s, seed, stage), "batch": s.batch, **world}
    vit = None
    if any(arm.startswith("vit") for arm in arms):
        vit = stage("ViT", [Job("vit", random_vit, {"width": VIT, "seed": seed}, 1)])[0] / "vit"
    lams = train_lams({arm: s.pretraining(arm, vit) for arm in arms}, given, stage)
    key = {"regime": regime, "seed": seed, "settings": s.same()}
    return [
        {**key, "arm": arm, **found}
        for arm, found in measure_motions(s, s.heldout_play, lams, stage, folds=s.folds, **world).items()
    ]


def train_lams(trainings: dict[str, dict[str, Any]], given: dict[str, Any], stage: Stage) -> dict[str, Path]:
    """Train a LAM for each arm; `trainings` and `given` are arguments of `pretrain_lam`, an arm's and those of all."""
    jobs = [Job(f"lam-{arm}", pretrain_lam, {**given, **one}, one["steps"]) for arm, one in trainings.items()]
    return {arm: folder / "lam" for arm, folder in zip(trainings, stage("LAM", jobs))}


def table(regime: str, rows: list[Row]) -> str:
    """A row for each arm: means over seeds, and what it adds to the short training, paired."""
    found = motion_report.by_arm(rows, regime)
    lines = []
    head = ["arm", "seeds", "R2 of the displacement, z alone", "of a still pair"]
    head += ["beyond the present, of what can be seen", "share of it", "over short (t, 95 %)"]
    for arm in (arm for arm in (*ARMS, *LATER) if arm in {name for _, name in found}):
        value = functools.partial(motion_report.average, found, arm)
        added = "" if arm == "short" else motion_report.over(found, arm, "short", "share_beyond")
        seeds = str(sum(name == arm for _, name in found))
        seen = f"{value('beyond'):.2f} of {value('ceiling_beyond'):.2f}"
        alone = [f"{value(key):.2f}" for key in ("pair", "still")]
        lines.append([arm, seeds, *alone, seen, f"{value('share_beyond'):.2f}", added])
    return markdown.table(head, lines)


def shares(rows: list[Row], regime: str = "distractors") -> dict[str, float]:
    """By arm the mean share of what can be seen, over seeds; empty where an arm has none."""
    found = motion_report.by_arm(rows, regime)
    named = {arm for _, arm in found}
    if not named.issuperset(ARMS):
        return {}
    return {arm: motion_report.average(found, arm, "share_beyond") for arm in (*ARMS, *LATER) if arm in named}


def reading(rows: list[Row], regime: str = "distractors") -> str:
    """What was aimed at in a regime, and what was reached; empty where an arm has no rows."""
    if not (share := shares(rows, regime)):
        return ""
    found = motion_report.by_arm(rows, regime)
    seeds = {arm: sum(name == arm for _, name in found) for arm in share}

    def added(arm: str, to: str) -> str:
        return motion_report.over(found, arm, to, "share_beyond")

    def aim(arm: str, least: float) -> str:
        return f"aimed at were {least:g}, {'reached' if share[arm] >= least else 'not reached'}"

    without, known = AIMS[regime]
    still = max(motion_report.average(found, arm, "still") / motion_report.average(found, arm, "pair") for arm in ARMS)
    parts = [
        f"""**Without labels**, {seeds["augmented"]} of 5 seeds: {share["short"]:.2f} of what can be seen after the short
        training, {share["long"]:.2f} after the long one ({aim("long", without)}); squares and light add
        {added("augmented", "long")}: {share["augmented"]:.2f} ({aim("augmented", without)}).""",
        f"""**With the actions of five demonstrations a task** {added("labelled", "augmented")} to that:
        {share["labelled"]:.2f} ({aim("labelled", known)}).""",
        f"""**A still pair** alone says up to {still:.0%} of what the pair alone says; a tenth was aimed at.""",
    ]
    for arm, beside, named, least in (
        ("subtracted", "augmented", "without", without),
        ("subtracted_labelled", "labelled", "with", known),
    ):
        if arm in share:
            alone = f"""{motion_report.average(found, arm, "share"):.2f} of what can be seen at all,
            {motion_report.over(found, arm, beside, "share")} to z as it is"""
            parts.append(
                f"""**The still pair's z subtracted** ({named} labels, {seeds[arm]} seeds): {share[arm]:.2f} of what can be
                seen beyond the present ({aim(arm, least)}), {added(arm, beside)} to z as it is; alone it says {alone},
                and a still pair nothing."""
            )
    if "vit" in share:
        parts.append(
            f"""**On a frozen ViT with random weights**, {seeds["vit"]} seeds: {share["vit"]:.2f} of what can be seen
            ({aim("vit", without)}), {added("vit", "vit_short")} to the {share["vit_short"]:.2f} after the short
            training."""
        )
    return markdown.bullets(*parts)


def section() -> str:
    """Tables of the committed rows, and what they show."""
    rows = read_rows(ROWS)
    regimes = [regime for regime in ("distractors", "clean") if any(row["regime"] == regime for row in rows)]
    parts = [f"{regime.capitalize()}:\n\n{table(regime, rows)}\n\n{reading(rows, regime)}" for regime in regimes]
    return "\n\n".join(part.strip() for part in parts) or "Not run yet."


SECTIONS = {"benchmarks/README.md": {"training": section}}


def main() -> int:
    """Run what is missing."""
    settings = tyro.cli(Settings, description=__doc__)
    if settings.table:
        for regime in settings.regimes:
            print(table(regime, read_rows(settings.rows)))
        return 0
    run_missing(settings, settings.arms, run_seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
