"""The paper's loop on LIBERO, from nothing: `make libero`, or `python -m examples.libero`.

1. A scripted expert records demonstrations; play without a task gives video.
2. `lara train-lam` learns a latent action model (LAM) from the play video alone.
3. A policy learns from the demonstrations, without LARA and with it. All else is equal.
4. `lara serve` serves each policy over ZMQ, and `lara eval` lets it act from LIBERO's stored starts.
5. A table, and a picture of the films, are written to the output folder.

With `--policy lerobot` (make libero-lerobot) the policy is LeRobot's Multi-Task DiT, trained and served in LeRobot's own
environment. A run that was killed resumes where it stopped. `--preset smoke` takes a few minutes; `full` about an hour on
two idle cores. LIBERO tasks with scripted demonstrations: rates are not comparable with published ones.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from examples.demo.cli import exit_status, read_presets
from examples.demo.stages import Job, run_jobs
from examples.libero import commands, record, report
from examples.libero.served import VARIABLE
from examples.libero.tables import instructions
from examples.libero.train import ARMS, lerobot_command, table_jobs, train
from examples.metaworld_sim import find_gl
from lara_adapter.errors import LaraError


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line. The defaults are those of the preset "full"."""

    preset: Literal["full", "smoke"] = "full"
    """smoke: one task, a few minutes; shows only that everything runs."""
    policy: Literal["mini", "lerobot"] = "mini"
    """mini: examples/mini_vla.py. lerobot: LeRobot's Multi-Task DiT, small, with a random CLIP."""
    lerobot: Path = Path(".venv-lerobot-host/bin/python")
    """Python of the environment that LeRobot is installed in (make lerobot-env)."""
    output: Path = Path("outputs/libero")
    """Where everything is written."""
    suite: Literal["libero_object", "libero_spatial"] = "libero_object"
    """Tasks that the expert masters."""
    tasks: tuple[int, ...] = tuple(range(10))
    """Numbers of tasks in the suite."""
    demos: int = 20
    """Demonstrations of each task to train on."""
    heldout: int = 2
    """Further ones, to measure the error of actions."""
    play: int = 4
    """Episodes of play video of each task."""
    quality: Literal["libero", "fast"] = "fast"
    """How LIBERO renders; "libero" as its own demonstrations, in twice the time."""
    lam_steps: int = 1500
    """Training steps of the LAM."""
    policy_steps: int = 2500
    """Training steps of each policy."""
    batch: int = 32
    """Rows per batch."""
    lr: float = 1e-3
    """Peak learning rate of the policies."""
    episodes: int = 10
    """Closed-loop episodes of each task."""
    execute: int = 8
    """Actions executed of each chunk of 16."""
    videos: int = 1
    """Films of each task."""
    max_steps: int | None = None
    """Longest episode; without it LIBERO's limit."""
    seed: int = 0
    """Of starts, weights, order and noise."""
    workers: int = 2
    """Processes, of 2.5 GB of memory each while they simulate."""

    def recording(self, *, play: bool) -> record.Settings:
        """What is recorded."""
        return record.Settings(
            self.output / ("play" if play else "demonstrations"), self.suite, self.tasks,
            episodes=self.play if play else self.demos + self.heldout,
            seed=self.seed + 500 * play, play=play, quality=self.quality, workers=self.workers,
        )  # fmt: skip


PRESETS = {
    "full": Settings(),
    "smoke": Settings(
        preset="smoke", tasks=(0,), demos=2, heldout=1, play=1, lam_steps=20, policy_steps=20, batch=8, episodes=1,
        max_steps=24, workers=1,
    ),
}  # fmt: skip


def run(settings: Settings) -> str:
    """Run what is not finished yet; returns the table.

    Raises:
        LaraError: LIBERO or OpenGL is missing.
        CommandFailed: a step failed.
    """
    demonstrations, play = (settings.recording(play=play) for play in (False, True))
    for title, recording in (("demonstrations", demonstrations), ("play", play)):
        print(f"\n1/5 record {title}", flush=True)
        record.run(recording)
    print("\n2/5 train the LAM on play", flush=True)
    lam = settings.output / "lam"
    if not (lam / "config.json").is_file():
        commands.lara(
            "train-lam", str(play.root), "--output", str(lam), "--preset", "tiny", "--cameras", "image", "--gap", "16",
            "--steps", str(settings.lam_steps), "--seed", str(settings.seed), "--health-every", str(settings.lam_steps),
        )  # fmt: skip
    print("\n3/5 train the policies", flush=True)
    trained = _train_lerobot(settings, lam) if settings.policy == "lerobot" else _train_mini(settings, lam)
    print("\n4/5 serve and evaluate", flush=True)
    world = {"suite": settings.suite, "quality": settings.quality, "image_size": demonstrations.size, "gripper": "raw"}
    folders = {}
    for arm, server in trained.items():
        folders[arm] = settings.output / "evaluation" / settings.policy / arm
        if not (folders[arm] / "report.json").is_file():
            limit = [] if settings.max_steps is None else ["--max-steps", str(settings.max_steps)]
            rename = ["--rename", "image2=wrist_image"] if settings.policy == "lerobot" else []
            with commands.served(server) as address:
                commands.lara(
                    "eval", *demonstrations.names(), "--simulator", "libero", "--host", address,
                    "--setting", *(f"{key}={value}" for key, value in world.items()), *rename, *limit,
                    "--episodes", str(settings.episodes), "--execute", str(settings.execute),
                    "--videos", str(settings.videos), "--workers", str(settings.workers), "--output", str(folders[arm]),
                )  # fmt: skip
    print("\n5/5 report", flush=True)
    return report.write(settings.output / f"report-{settings.policy}.md", folders)


def _train_mini(settings: Settings, lam: Path) -> dict[str, commands.Server]:
    """Train a MiniVLA for each arm; returns how each is served."""
    recording, cache = settings.recording(play=False), settings.output
    splits = {"demos": [0, settings.demos], "heldout": [settings.demos, settings.demos + settings.heldout]}
    tables = run_jobs("tables", table_jobs(recording.root, recording.names(), splits), cache, settings.workers)
    options = {"data": tables, "steps": settings.policy_steps, "batch": settings.batch, "lr": settings.lr}
    options |= {"seed": settings.seed, "execute": settings.execute, "instructions": instructions(recording.root)}
    jobs = [
        Job(
            f"policy-{arm}",
            train,
            {**options, "lam": lam if lara else None, "lara_options": lara},
            settings.policy_steps,
        )
        for arm, lara in ARMS.items()
    ]
    folders = run_jobs("policies", jobs, cache, settings.workers)
    return {
        arm: commands.Server(Path(sys.executable), "examples.libero.served:policy", {VARIABLE: str(folder)})
        for arm, folder in zip(ARMS, folders, strict=True)
    }


def _train_lerobot(settings: Settings, lam: Path) -> dict[str, commands.Server]:
    """Train LeRobot's Multi-Task DiT with LARA and without; returns how each is served."""
    servers, root = {}, settings.recording(play=False).root
    numbers = {"steps": settings.policy_steps, "batch": settings.batch, "seed": settings.seed}
    for arm in ("dit_only", "lara_contrastive"):
        output = settings.output / "lerobot" / arm
        if not (output / "report.json").is_file():
            commands.run(settings.lerobot, *lerobot_command(arm, root, lam, output, lr=settings.lr, **numbers))
        servers[arm] = commands.Server(settings.lerobot, str(output / "policy"), {})
    return servers


def main() -> int:
    """Run the loop; returns the exit status."""
    settings = read_presets(Settings, PRESETS, sys.argv[1:], str(__doc__))
    settings = dataclasses.replace(settings, output=settings.output.resolve())

    def work() -> str:
        gl = find_gl()
        print(f"LARA on LIBERO, preset {settings.preset}, rendering with {gl}, results in {settings.output}/")
        print(f"\n{run(settings)}\n")
        return f"Report, films, policies and datasets: {settings.output}/"

    return exit_status(work, LaraError, commands.CommandFailed)


if __name__ == "__main__":
    sys.exit(main())
