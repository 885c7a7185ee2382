"""LARA from scratch in a few minutes on two CPU cores: `make demo`, or `python -m examples.demo`.

1. Scripted experts of a simulator (Meta-World) give demonstrations; noisy ones give play video without actions.
2. A latent action model (LAM) learns from the video alone what changes between two frames.
3. A small flow-matching diffusion policy learns from few demonstrations: without LARA, with a frozen LAM, with LARA as
   in the paper, and with the contrastive form of LARA. All else is equal.
4. All policies act from the same starts. On play that no model has seen, each LAM's latent is asked how the hand moves,
   beyond what the present frame says; a linear probe asks for the expert's action.
5. Table, report, pictures, rollouts and the adapter are written to the output folder.

A run that was killed resumes where it stopped. `--help` lists every setting; `--preset smoke` takes about a minute.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from examples.demo.cli import check_settings, exit_status, read_presets
from examples.demo.data import collect, collect_heldout_play
from examples.demo.eval import closed_loop
from examples.demo.motion import examine_motion, find_ceiling
from examples.demo.probe import examine_lam
from examples.demo.settings import Experiment
from examples.demo.stages import Job, run_jobs
from examples.demo.train import continue_lam, pretrain_lam, reload_adapter, train_policy
from examples.metaworld_sim import find_gl


@dataclasses.dataclass(frozen=True)
class Settings(Experiment):
    """Settings of the demo. The defaults are those of the preset "demo"."""

    preset: Literal["demo", "smoke", "full"] = "demo"
    """smoke: about a minute, shows only that everything runs. full: half an hour."""
    output: Path = Path("outputs/demo")
    """Where results are written. Finished stages are kept in cache/, under names that depend on their settings."""
    seed: int = 0
    """Seed of starts, weights, data order, noise and distractors."""
    heldout_play: int = 20
    """Episodes of play per task that no model learns from, to measure motion on."""
    ceiling_widths: tuple[int, ...] = ()
    """Widths of networks that are trained with labels, in addition to regressions, to measure how much motion can be seen;
    tried until one brings no improvement. Takes ten minutes or more. Empty: regressions only."""
    distractors: bool = True
    """Put random squares and light into every frame, for the LAM, the policies and the evaluation."""
    align_weight: float = 0.1
    """w1 of LARA, Eq. 7. The paper's 0.01 has no effect in so few steps."""
    lam_weight: float = 0.1
    """w2. Under Adam only the ratio of w1 and w2 matters to the LAM; it is 1 in the paper too."""
    contrastive_lam_grad_scale: float = 1.0
    """Factor on the contrastive gradient that reaches the LAM."""

    def __post_init__(self) -> None:
        check_settings(self)

    def arms(self) -> dict[str, dict[str, Any] | None]:
        """Arguments of `attach_lara` for each policy; None: no LARA."""
        weights = {"align_weight": self.align_weight, "lam_weight": self.lam_weight}
        return {
            "dit_only": None,
            "frozen_lam": {**weights, "train_lam": False},
            "lara_cosine": {**weights, "alignment": "cosine"},
            "lara_contrastive": {
                **weights,
                "alignment": "contrastive",
                "lam_grad_scale": self.contrastive_lam_grad_scale,
            },
        }


PRESETS = {
    "demo": Settings(),
    "smoke": Settings(
        preset="smoke",
        demos=2,
        heldout=2,
        play=3,
        heldout_play=2,
        lam_steps=24,
        policy_steps=20,
        batch=16,
        episodes=2,
        max_steps=32,
        ceiling_widths=(4,),
    ),
    "full": Settings(
        preset="full",
        demos=20,
        heldout=25,
        play=100,
        lam_steps=2000,
        policy_steps=2500,
        episodes=100,
        heldout_play=40,
        ceiling_widths=(16, 32),
    ),
}


def read_settings(arguments: list[str]) -> Settings:
    """Read the command line; see :func:`read_presets`."""
    return read_presets(Settings, PRESETS, arguments, str(__doc__))


def run(settings: Settings) -> str:
    """Run the stages that are not finished yet, and write the results.

    Args:
        settings: of the run.

    Returns:
        The tables and their interpretation.
    """
    cache = settings.output / "cache"
    timings: dict[str, dict[str, float]] = {}

    def stage(title: str, jobs: dict[str, Job]) -> dict[str, Path]:
        folders = run_jobs(title, list(jobs.values()), cache, settings.workers)
        timings.update((job.name, job.timing(cache)) for job in jobs.values())
        return dict(zip(jobs, folders))

    world = {"distractors": settings.distractors, "seed": settings.seed}
    training = {**world, "batch": settings.batch, "lr": settings.lr}

    counts = {"demos": settings.demos, "heldout": settings.heldout, "play": settings.play}
    episodes = {"counts": counts, "play_steps": settings.play_steps, "seed": settings.seed}
    recorded = stage(
        "1/5 record",
        {
            task: Job(f"record-{task}", collect, {"task": task, **episodes}, sum(counts.values()))
            for task in settings.tasks
        },
    )
    data = list(recorded.values())
    unseen = {"episodes": settings.heldout_play, "play_steps": settings.play_steps, "seed": settings.seed}
    play = stage(
        "1/5 record",
        {
            task: Job(f"record-play-{task}", collect_heldout_play, {"task": task, **unseen}, settings.heldout_play)
            for task in settings.tasks
        },
    )
    moving = {"play": list(play.values()), **world}
    supervised = {**moving, "folds": 3, "widths": list(settings.ceiling_widths), "rates": [1e-3]}

    def policy(arm: str, lam: Path | None) -> Job:
        options = {"data": data, "lam": lam, "lara_options": arms[arm], "steps": settings.policy_steps, **training}
        return Job(f"policy-{arm}", train_policy, {**options, "execute": settings.execute}, settings.policy_steps)

    arms = settings.arms()
    from_video = {"data": data, "steps": settings.lam_steps, **training}
    first = stage(
        "2/5 LAM, baseline",
        {
            "before": Job("lam-before", pretrain_lam, from_video, settings.lam_steps),
            "dit_only": policy("dit_only", None),  # needs no LAM, so it runs beside the first one
        },
    )
    lam = first["before"] / "lam"

    further = {"data": data, "lam": lam, "steps": settings.policy_steps, **training}
    second = stage(
        "3/5 LARA, control",
        {
            "lara_cosine": policy("lara_cosine", lam),
            "lara_contrastive": policy("lara_contrastive", lam),
            "frozen_lam": policy("frozen_lam", lam),
            "control": Job("lam-control", continue_lam, further, settings.policy_steps),
            "ceiling": Job("ceiling", find_ceiling, supervised, 1),
        },
    )
    ceiling = second.pop("ceiling")
    trained = {**first, **second}

    acting = {
        "policies": {arm: trained[arm] / "policy.pt" for arm in arms},
        "episodes": settings.episodes,
        "filmed": min(2, settings.episodes),
        "max_steps": settings.max_steps,
        "execute": settings.execute,
        **world,
    }
    evaluated = stage(
        "4/5 closed loop",
        {
            task: Job(
                f"closed-loop-{task}",
                closed_loop,
                {"task": task, "task_index": index, **acting},
                settings.episodes * len(arms),
            )
            for index, task in enumerate(settings.tasks)
        },
    )

    lams = {name: trained[name] / "lam" for name in ("before", "control", "lara_cosine", "lara_contrastive")}
    measuring = {
        name: Job(f"probe-{name}", examine_lam, {"data": data, "lam": lam, "shown": 4, **world}, 1)
        for name, lam in lams.items()
    }
    moved = {
        f"motion-{name}": Job(f"motion-{name}", examine_motion, {**moving, "lam": lam, "ceiling": ceiling}, 1)
        for name, lam in lams.items()
    }
    loading = {"data": data, "trained": trained["lara_contrastive"], "batch": settings.batch, **world}
    examined = stage("5/5 measure", {**measuring, **moved, "reload": Job("reload", reload_adapter, loading, 1)})
    reloaded, motion = examined.pop("reload"), {name: examined.pop(f"motion-{name}") for name in lams}

    from examples.demo import report  # not at the top: the processes of the jobs do not need matplotlib

    return report.write(
        report.Run(
            settings.output, dataclasses.asdict(settings), timings, trained, evaluated, examined, motion, reloaded
        )
    )


def main() -> int:
    """Run the demo; returns the exit status."""
    settings = read_settings(sys.argv[1:])

    def work() -> str:
        gl = find_gl()
        print(f"LARA demo, preset {settings.preset}, rendering with {gl}, results in {settings.output}/")
        print(f"\n{run(settings)}\n")
        return f"Report, curves, pictures, rollouts and the adapter: {settings.output}/report.md"

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
