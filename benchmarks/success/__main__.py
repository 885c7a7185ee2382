"""Does LARA make policies succeed more often? Meta-World, few demonstrations, paired seeds.

    pip install -e ".[demo,train]"
    python -m benchmarks.success                               # resumable; rows are appended as they come
    python -m benchmarks.success --stages ablations cosine_depth --regimes distractors --seeds 0 1 2
    python -m benchmarks.success.report                        # tables and pictures of the rows that are there

The first command is the first stage: two tasks, ten demonstrations, the main arms (arms.py), eight
seeds, with distractors and without: hours on two cores. What follows it, one command each:

    for n in 3 30; do python -m benchmarks.success --demos $n; done
    python -m benchmarks.success --tasks button-press-topdown drawer-open door-open window-open hammer peg-insert-side \\
        --seeds 0 1 2 3 4 5 6 7 8 9 10 11

Fixed before the first run: the primary endpoint is the success rate of `contrastive` minus that of `dit_only`, distractors,
10 demonstrations a task, mean over tasks, paired over seeds; the paper's comparison, `cosine` minus `dit_only`, is the
second. All else is secondary.

Fixed before its run, after eight seeds of 3 demonstrations with distractors had shown `contrastive` ahead: the same
difference on eight new seeds, where `frozen_random` says whether content or regularisation is at work:

    python -m benchmarks.success --demos 3 --regimes distractors --arms dit_only contrastive frozen_random \\
        --seeds 8 9 10 11 12 13 14 15 --rows benchmarks/results/success/rows-confirm.jsonl

Whether the policy is too small to gain: one of eleven times as many parameters (8.1 M), twice as deep:

    python -m benchmarks.success --width 256 --depth 8 --regimes distractors --arms dit_only cosine contrastive control

For each seed and regime everything is new: starts, demonstrations, play video, the LAM trained on it, weights. Within a
seed all arms share data, order, initial weights, starts and sampling noise of the evaluation, and distractors. What
trains, acts and measures are the demo's modules (examples/demo), with the demo's settings.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from benchmarks.success.arms import ARMS, CONTROL, STAGES, Arm
from benchmarks.success.jobs import act, open_stages, random_lam, record, run_missing
from benchmarks.success.rows import ROWS, environment, read_numbers
from examples.demo.probe import examine_lam
from examples.demo.settings import Experiment
from examples.demo.stages import Job
from examples.demo.train import continue_lam, pretrain_lam, train_policy
from examples.mini_vla import MiniVLAConfig
from lara_adapter.storage.files import read_json


@dataclasses.dataclass(frozen=True)
class Settings(Experiment):
    """Settings of the benchmark. Rows of the same settings are never measured twice."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Each is the whole experiment anew."""
    regimes: tuple[Literal["distractors", "clean"], ...] = ("distractors", "clean")
    """Whether every frame gets random squares and light."""
    stages: tuple[Literal["main", "gradient", "ablations", "cosine_depth"], ...] = ("main",)
    """Groups of arms."""
    arms: tuple[str, ...] = ()
    """Single arms, instead of groups."""
    width: int = MiniVLAConfig.width
    """Width of the policy."""
    depth: int = MiniVLAConfig.depth
    """Blocks of the policy's diffusion transformer."""
    cache: Path = Path("outputs/success")
    """Folder of finished jobs."""
    rows: Path = ROWS
    """File that the rows are added to."""

    def same(self) -> dict[str, Any]:
        """The settings that a row depends on, beside its regime, seed and arm."""
        left_out = ("seeds", "regimes", "stages", "arms", "workers", "cache", "rows", "width", "depth")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out} | self.size()

    def size(self) -> dict[str, int]:
        """The sizes of the policy that are not the default: usually none, so that jobs keep their names."""
        default = MiniVLAConfig()
        return {key: getattr(self, key) for key in ("width", "depth") if getattr(self, key) != getattr(default, key)}

    def arm_names(self) -> tuple[str, ...]:
        """Names of the arms to run."""
        return self.arms or tuple(name for stage in self.stages for name in STAGES[stage])


def data_changes(arm: Arm) -> dict[str, Any]:
    """What an arm changes of its data: usually nothing, so that jobs keep their names."""
    changed = {"gap": arm.gap, "video": arm.video}
    return {key: value for key, value in changed.items() if value != getattr(Arm(None), key)}


def _key(world: dict[str, Any]) -> str:
    """Name of the data that a LAM is pretrained with, beside the defaults."""
    return " ".join(f"{key}{value}" for key, value in world.items())


class Trained(NamedTuple):
    """Folders of one seed in one regime: recordings, what each arm trained, and the LAM of each and of "before"."""

    data: list[Path]
    arms: dict[str, Path]
    lams: dict[str, Path]


def train_arms(settings: Settings, regime: str, seed: int, arms: list[str]) -> Trained:
    """Record, pre-train and train what is missing of one seed in one regime."""
    s, world = settings, {"distractors": regime == "distractors", "seed": seed}
    training = {**world, "batch": s.batch, "lr": s.lr}
    stage = open_stages(f"{regime} {seed}", s.cache, s.workers)
    data = record(s, seed, stage)
    random = Job("lam-random", random_lam, {"steps": s.lam_steps, "seed": seed}, 1)
    pretraining = {"data": data, "steps": s.lam_steps, **training}
    worlds = {arm: {} if arm == CONTROL else data_changes(ARMS[arm]) for arm in arms}
    gaps = {arm: {key: value for key, value in changed.items() if key == "gap"} for arm, changed in worlds.items()}
    pretrainings = {
        key: Job("-".join(["lam-before", *key.split()]), pretrain_lam, {**pretraining, **world}, s.lam_steps)
        for key, world in {"": {}, **{_key(world): world for world in worlds.values()}}.items()
    }
    made = stage("LAM", [*pretrainings.values(), random])
    before, random_folder = {key: path / "lam" for key, path in zip(pretrainings, made)}, made[-1] / "lam"
    jobs = []
    for arm in arms:
        given = {"data": data, "steps": s.policy_steps, **training}
        if arm == CONTROL:
            jobs.append(Job("lam-control", continue_lam, {**given, "lam": before[""]}, s.policy_steps))
            continue
        lam = random_folder if ARMS[arm].lam == "random" else before[_key(worlds[arm])]
        given |= {"lam": None if ARMS[arm].options is None else lam, "lara_options": ARMS[arm].options}
        given |= {"execute": s.execute, **gaps[arm]}
        changed = s.size() | ARMS[arm].policy
        given |= {"config": changed} if changed else {}
        jobs.append(Job(f"policy-{arm}", train_policy, given, s.policy_steps))
    trained = dict(zip(arms, stage("train", jobs)))
    lams = {"before": before[""], **{arm: trained[arm] / "lam" for arm in arms if (trained[arm] / "lam").is_dir()}}
    return Trained(data, trained, lams)


def run_seed(settings: Settings, regime: str, seed: int, arms: list[str]) -> list[dict[str, Any]]:
    """Run one seed in one regime; returns a row for each arm."""
    s, world = settings, {"distractors": regime == "distractors", "seed": seed}
    data, trained, lams = train_arms(settings, regime, seed, arms)
    gaps = {arm: {"gap": ARMS[arm].gap} for arm in arms if arm != CONTROL and "gap" in data_changes(ARMS[arm])}
    stage = open_stages(f"{regime} {seed}", s.cache, s.workers)
    policies = {arm: trained[arm] / "policy.pt" for arm in arms if arm != CONTROL}
    solved = act(s, policies, world, stage)
    examining = {"data": data, "shown": 1, **world}
    probes = dict(
        zip(
            lams,
            stage(
                "probe",
                [
                    Job(f"probe-{name}", examine_lam, {**examining, "lam": lam, **gaps.get(name, {})}, 1)
                    for name, lam in lams.items()
                ],
            ),
        )
    )
    rows = []
    for arm in ["before", *arms]:
        row: dict[str, Any] = {"regime": regime, "seed": seed, "arm": arm, "settings": settings.same()}
        if arm in policies:
            row["solved"] = solved[arm]
            row["action_error"] = read_json(trained[arm] / "action_error.json")["action_error"]
        if arm in probes:
            row["lam"] = read_numbers(probes[arm] / "measured.json")
        row["environment"] = environment("metaworld", "mujoco")
        rows.append(row)
    return rows


def main() -> int:
    """Run what is missing."""
    settings = tyro.cli(Settings, description=__doc__)
    unknown = set(settings.arms) - {*ARMS, CONTROL}
    if unknown:
        sys.stderr.write(
            f"--arms: unknown {', '.join(sorted(unknown))}; expected some of {', '.join([*ARMS, CONTROL])}\n"
        )
        return 2
    run_missing(settings, settings.arm_names(), run_seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
