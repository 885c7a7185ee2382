"""Do the LAMs of the success benchmark hold motion? On play that no model learnt from, beside what can be seen at all.

    python -m benchmarks.success.motion        # eight seeds, both regimes; resumable, with the jobs of benchmarks.success
    python -m benchmarks.success.motion --seeds 0 --regimes distractors --widths 16    # networks too for the ceiling

Each line of results/success/motion.jsonl is one LAM: `regime`, `seed`, `arm`, `settings` (of data and training, and of the
ceiling), `environment`, `ceiling` (the networks that were tried, with their R2 in validation), and `motion`: target
("displacement" of the hand in 16 steps, "action", its mean command) -> the fields of
`lara_adapter.lam.health.motion.Motion`, estimates with the 95 % interval of a bootstrap over episodes.

Fixed before the first row: what an alignment teaches the LAM about motion is `beyond` for the displacement, with
distractors, minus that of `control`, paired over seeds. `cosine_late` and `contrastive_late` ask whether the flow time is
what counts: all of their alignment is at times near 1 (arms.py).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks import markdown
from benchmarks.success import __main__ as success
from benchmarks.success import motion_report, report
from benchmarks.success.arms import ARMS, CONTROL, FLOW_TIME
from benchmarks.success.jobs import measure_motions, open_stages, run_missing
from benchmarks.success.rows import MOTION


@dataclasses.dataclass(frozen=True)
class Settings(success.Settings):
    """Settings; those of the success benchmark are its own."""

    arms: tuple[str, ...] = (CONTROL, "cosine", "contrastive", *FLOW_TIME)
    """Whose LAMs are measured, beside the one before joint training."""
    rows: Path = MOTION
    """File that the rows are added to."""
    heldout_play: int = 40
    """Episodes of play per task to measure on."""
    folds: int = 5
    """Of episodes, each predicted by what was trained on the others."""
    widths: tuple[int, ...] = ()
    """Widths of the networks for the ceiling, tried until one brings no improvement. None: regressions alone, which take a
    minute instead of half an hour; differences between arms do not depend on it."""
    rates: tuple[float, ...] = (1e-3,)
    """Their learning rates. On seed 0 with distractors neither 3e-4 nor width 32 was better."""

    def same(self) -> dict[str, Any]:
        """The settings that a row depends on: nothing of the closed loop."""
        return {key: value for key, value in super().same().items() if key not in ("episodes", "max_steps", "execute")}


def run_seed(settings: Settings, regime: str, seed: int, arms: list[str]) -> list[dict[str, Any]]:
    """Measure one seed in one regime; returns a row for each arm and for "before"."""
    s, world = settings, {"distractors": regime == "distractors", "seed": seed}
    lams = success.train_arms(settings, regime, seed, arms).lams
    stage = open_stages(f"{regime} {seed}", s.cache, s.workers)
    key = {"regime": regime, "seed": seed, "settings": settings.same()}
    measured = measure_motions(s, s.heldout_play, lams, stage, folds=s.folds, widths=s.widths, rates=s.rates, **world)
    return [{**key, "arm": arm, **found} for arm, found in measured.items()]


def recorded(regime: str) -> report.Rows:
    """The committed rows of a regime, by seed and arm."""
    return motion_report.recorded(MOTION, regime)


def reading() -> str:
    """What the alignments teach about motion, with distractors."""
    rows = recorded("distractors")
    gained = {arm: motion_report.over_control(rows, arm, "beyond") for arm in ("contrastive", "cosine")}
    late = {arm: motion_report.over(rows, f"{arm}_late", arm, "beyond") for arm in ("contrastive", "cosine")}
    values = [motion_report.average(rows, arm, "beyond") for arm in ("contrastive", CONTROL)]
    seen, start = (motion_report.average(rows, *which) for which in ((CONTROL, "ceiling_beyond"), ("before", "beyond")))
    return markdown.bullets(
        f"""**Over as many steps without alignment** ({len({seed for seed, _ in rows})} seeds, distractors), of the
        displacement beyond the present frame: contrastive {gained["contrastive"]}, cosine {gained["cosine"]}. The means are
        {values[0]:.2f}, and {values[1]:.2f} without alignment, of {seen:.2f} that can be seen; {start:.2f} before.""",
        f"""**At late flow times**: all of the alignment there adds {late["contrastive"]} to the contrastive form, and
        {late["cosine"]} to cosine. That is too little to offer flow times as an option.""",
    )


def section() -> str:
    """Tables of the committed rows, and what they show."""
    regimes = {regime: recorded(regime) for regime in ("distractors", "clean")}
    parts = [f"{regime.capitalize()}:\n\n{motion_report.table(rows)}" for regime, rows in regimes.items() if rows]
    return "\n\n".join([*parts, reading()])


SECTIONS = {"benchmarks/README.md": {"motion": section}}


def main() -> int:
    """Run what is missing."""
    settings = tyro.cli(Settings, description=__doc__)
    unknown = set(settings.arms) - {*ARMS, CONTROL}
    if unknown:
        sys.stderr.write(f"--arms: unknown {', '.join(sorted(unknown))}\n")
        return 2
    run_missing(settings, settings.arms, run_seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
