"""Does video of experts without actions make a policy succeed? 3 labelled demonstrations a task, and 40 episodes of video.

    pip install -e ".[demo,train]"
    python -m benchmarks.success.video             # resumable; rows are appended as they come
    python -m benchmarks.success.video --table     # of the rows that are there

Arms, which share starts, demonstrations, initial weights, order and noise:

- labelled: the demonstrations alone;
- true: and the video with its true actions, the ceiling;
- decoded: and the video with actions decoded from the latent actions of a LAM that learnt from play video, by the decoder
  of `lara label --actions`, fitted on the demonstrations;
- supervised: likewise, of a LAM that learnt from play video and these demonstrations, as `lara train-lam --actions
  --augment` does, for longer;
- aligned: no actions for the video, but LARA on it as on the demonstrations: noise goes in for the actions, and the state
  of the policy is aligned (contrastive, w1 = w2 = 0.1) with the LAM's z, in a group of its own;
- both: decoded actions, and LARA on the video as on the demonstrations;
- lara: LARA on the demonstrations alone, what `aligned` has to be compared with too.

In all with video each step sees as many rows of video as of demonstrations, with the robot's state hidden.

Fixed before the first run: the primary endpoint is success of `decoded` minus `labelled`, clean, mean over tasks, paired
over the seeds 16 to 23, which nothing was chosen on; the goal is half of `true` minus `labelled`. The same with distractors
is secondary. Each row holds what the labels are worth: R2 of the decoded chunk, of a plain ridge regression from z, and of
the mean movement from z of two equal frames. The decoder was chosen on seeds 0 and 1, by R2 on their video.
`supervised` and `aligned` came later, after the rows of the others on clean pictures and of two seeds with distractors;
nothing of theirs was chosen on these seeds. The primary endpoint of `supervised` is success minus `decoded`, with
distractors; that of `aligned` is success minus `labelled`, clean. `both` and `lara` came after two and three seeds
of `aligned`; the primary endpoint of `both` is success minus `decoded`, clean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import tyro

from benchmarks import RESULTS, markdown
from benchmarks.success.arms import CONTRASTIVE
from benchmarks.success.jobs import act, open_stages, record
from benchmarks.success.report import bootstrap, solved, t_interval
from benchmarks.success.rows import Row, append_missing, environment, read_numbers, read_rows
from examples.demo.data import collect_expert_video
from examples.demo.settings import Experiment
from examples.demo.stages import Job
from examples.demo.train import pretrain_lam
from examples.demo.video import train_with_video
from examples.metaworld_sim import find_gl
from lara_adapter.lam.label.decoder import LEAST_R2
from lara_adapter.storage.files import read_json

ROWS = RESULTS / "success" / "video.jsonl"
DEMO_ROWS = RESULTS / "quickstart" / "video.jsonl"  # of `make demo-video`
ARMS = {
    "labelled": "none",
    "true": "true",
    "decoded": "decoded",
    "supervised": "decoded",
    "aligned": "aligned",
    "both": "decoded",
    "lara": "none",
}
Arm = Literal["labelled", "true", "decoded", "supervised", "aligned", "both", "lara"]
FIRST: tuple[Arm, ...] = ("labelled", "true", "decoded")  # of the protocol that the first row followed
LATER: tuple[Arm, ...] = ("supervised", "aligned", "both", "lara")
_WORTH = {"label R2, chunk": "r2_chunk", "by ridge": "r2_ridge", "mean movement": "r2", "from a still pair": "r2_still"}


@dataclasses.dataclass(frozen=True)
class Settings(Experiment):
    """Settings of the study. Rows of the same settings are never measured twice."""

    demos: int = 3
    """Labelled demonstrations per task."""
    video: int = 40
    """Episodes of experts per task whose actions are not known."""
    seeds: tuple[int, ...] = (16, 17, 18, 19, 20, 21, 22, 23)
    """Each is the whole experiment anew."""
    regimes: tuple[Literal["clean", "distractors"], ...] = ("clean", "distractors")
    """Whether every frame gets random squares and light."""
    arms: tuple[Arm, ...] = (*FIRST, *LATER)
    """Ways to use the video."""
    supervised_steps: int = 3600
    """Training steps of the LAM of the last."""
    supervised_lr: float = 1e-3
    """Its peak learning rate."""
    cache: Path = Path("outputs/success")
    """Folder of finished jobs."""
    rows: Path = ROWS
    """File that the rows are added to."""
    table: bool = False
    """Only print what is there."""

    def same(self, arm: str) -> dict[str, Any]:
        """The settings that a row of an arm depends on, beside its regime and seed."""
        left_out = ["seeds", "regimes", "arms", "workers", "cache", "rows", "table"]
        left_out += [] if arm == "supervised" else ["supervised_steps", "supervised_lr"]
        found = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def run_seed(s: Settings, regime: str, seed: int, arms: list[str]) -> list[Row]:
    """Run one seed in one regime; returns a row for each arm."""
    world = {"distractors": regime == "distractors", "seed": seed}
    training = {**world, "batch": s.batch, "lr": s.lr}
    stage = open_stages(f"{regime} {seed}", s.cache, s.workers)
    data = record(s, seed, stage)
    filming = {"episodes": s.video, "seed": seed}
    video = stage(
        "video",
        [Job(f"record-expert-{task}", collect_expert_video, {"task": task, **filming}, s.video) for task in s.tasks],
    )
    with_lam = [arm for arm in arms if arm not in ("labelled", "true")]
    jobs = [_lam(s, arm, {"data": data, **training}) for arm in with_lam]
    lams = dict(zip(with_lam, stage("LAM", jobs))) if jobs else {}
    given = {"data": data, "video": video, "steps": s.policy_steps, "execute": s.execute, **training}
    own = {arm: {"labels": ARMS[arm], "lam": lams[arm] / "lam" if arm in lams else None} for arm in arms}
    for arm in {"aligned", "both", "lara"} & set(own):
        own[arm]["lara_options"] = CONTRASTIVE
    jobs = [Job(f"video-{arm}", train_with_video, {**given, **own[arm]}, s.policy_steps) for arm in arms]
    trained = dict(zip(arms, stage("train", jobs)))
    outcomes = act(s, {arm: folder / "policy.pt" for arm, folder in trained.items()}, world, stage)
    rows = []
    for arm, folder in trained.items():
        row: Row = {"regime": regime, "seed": seed, "arm": arm, "settings": s.same(arm)}
        row["solved"] = outcomes[arm]
        row["action_error"] = read_json(folder / "action_error.json")["action_error"]
        if (folder / "labels.json").is_file():
            row["labels"] = read_numbers(folder / "labels.json")
        rows.append({**row, "environment": environment("metaworld", "mujoco")})
    return rows


def _lam(s: Settings, arm: str, given: dict[str, Any]) -> Job:
    """The training of an arm's LAM."""
    if arm != "supervised":
        return Job("lam-before", pretrain_lam, {**given, "steps": s.lam_steps}, s.lam_steps)
    changed = {"steps": s.supervised_steps, "lr": s.supervised_lr, "labelled": s.demos, "augmented": True}
    return Job("lam-supervised", pretrain_lam, {**given, **changed}, s.supervised_steps)


def success_of(row: Row) -> float:
    """Success in per cent, the mean over tasks."""
    return 100 * mean(text.count("1") / len(text) for text in row["solved"].values())


def as_table(rows: list[Row], regime: str) -> str:
    """Success of each arm, and paired over seeds its difference to the demonstrations alone with 95 % intervals."""
    found = {(row["arm"], row["seed"]): row for row in rows if row["regime"] == regime}
    head = ["arm", "success", "minus labelled (95 %, t over seeds)", "bootstrap", "seeds", *_WORTH]
    lines = list[list[str]]()
    for arm in ARMS:
        own = {seed: row for (name, seed), row in found.items() if name == arm}
        if not own:
            continue
        pairs = [(row, found["labelled", seed]) for seed, row in own.items() if ("labelled", seed) in found]
        difference = drawn = ""
        if arm != "labelled" and pairs:
            gained = [success_of(row) - success_of(base) for row, base in pairs]
            interval = t_interval(gained)
            difference = f"{mean(gained):+.1f}"
            difference += "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
            low, high = bootstrap(*(list(map(solved, side)) for side in zip(*pairs)))
            drawn = f"{100 * low:+.1f} to {100 * high:+.1f}"
        labels = [row["labels"] for row in own.values() if "labels" in row]
        worth = [f"{mean(each[key] for each in labels):.2f}" if labels else "" for key in _WORTH.values()]
        lines.append([arm, f"{mean(map(success_of, own.values())):.1f} %", difference, drawn, str(len(own)), *worth])
    return markdown.table(head, lines)


def gains(rows: list[Row], regime: str, arm: str, base: str = "labelled") -> list[float]:
    """Points of success over another arm, for each seed that has both and all of the first arms."""
    found = {(row["arm"], row["seed"]): success_of(row) for row in rows if row["regime"] == regime}
    needed = {arm, base, *FIRST}
    seeds = [seed for name, seed in found if name == "labelled" and all((each, seed) in found for each in needed)]
    return [found[arm, seed] - found[base, seed] for seed in seeds]


def added(rows: list[Row], regime: str, arm: str, base: str = "labelled") -> str:
    """The mean of :func:`gains`, with its 95 % interval (t over seeds)."""
    points = gains(rows, regime, arm, base)
    interval = t_interval(points)
    return f"{mean(points):+.1f}" + ("" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})")


def reading(rows: list[Row], regime: str) -> str:
    """How much of what true actions add the decoded ones add; and what the later arms add."""
    decoded, true = (gains(rows, regime, arm) for arm in ("decoded", "true"))
    if not decoded:
        return ""
    share = f"{mean(decoded) / mean(true):.0%} of it" if mean(true) > 0 else "there is nothing to close"
    if mean(true) > 0 > mean(decoded):
        share = "none of it"
    text = f"of {mean(true):+.1f} points that true actions add, decoded ones add {mean(decoded):+.1f}, {share}"
    text = f"{regime.capitalize()}, {len(decoded)} seeds: {text}."
    known = [row["labels"]["r2_left_out"] for row in rows if row["regime"] == regime and row["arm"] == "decoded"]
    if mean(known) < LEAST_R2:
        text += (
            f" `lara label` refuses such labels: their R2 on demonstrations left out is {mean(known):.2f}, and at least"
        )
        text += f" {LEAST_R2:g} is expected."
    for arm, base, what in (
        ("supervised", "decoded", "Labels in the LAM's training add {} to that"),
        ("aligned", "labelled", "Alignment on the video, without actions, adds {} to the demonstrations alone"),
        ("aligned", "lara", "Beside LARA on the demonstrations alone it adds {}"),
        ("both", "decoded", "Alignment adds {} to decoded actions"),
    ):
        if seeds := len(gains(rows, regime, arm, base)):
            text += f" {what.format(added(rows, regime, arm, base))} ({seeds} of the seeds)."
    return text


def recorded() -> list[Row]:
    """The committed rows."""
    return [row for row in read_rows(ROWS) if row["settings"] == Settings().same(row["arm"])]


def section() -> str:
    """Tables and reading of the committed rows."""
    rows = recorded()
    parts = []
    for regime in Settings().regimes:
        if any(row["regime"] == regime for row in rows):
            parts += [f"{regime.capitalize()}:", as_table(rows, regime), reading(rows, regime)]
    return "\n\n".join(filter(None, parts)) or "Not run yet."


def demo_section() -> str:
    """What `make demo-video` gave."""
    return as_table(read_rows(DEMO_ROWS), "clean")


SECTIONS = {"benchmarks/README.md": {"expert video": section}, "docs/demo.md": {"demo video": demo_section}}


def main() -> int:
    """Run what is missing, and print the tables."""
    settings = tyro.cli(Settings, description=__doc__)
    if not settings.table:
        find_gl()
        settings = dataclasses.replace(settings, cache=settings.cache.resolve())
        for seed in settings.seeds:
            for regime in settings.regimes:
                run = functools.partial(run_seed, settings, regime, seed)
                for arms in (FIRST, *((arm,) for arm in LATER)):
                    wanted = [arm for arm in arms if arm in settings.arms]
                    append_missing(settings.rows, regime, seed, settings.same(arms[0]), wanted, run)
    rows = [row for row in read_rows(settings.rows) if row["settings"] == settings.same(row["arm"])]
    for regime in settings.regimes:
        print(f"\n{regime}\n\n{as_table(rows, regime)}\n\n{reading(rows, regime)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
