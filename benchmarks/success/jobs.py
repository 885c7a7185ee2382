"""The stages that the Meta-World studies share: record, and act. Finished jobs are never run again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.success.rows import Row, append_missing, environment
from examples.demo.data import collect, collect_heldout_play
from examples.demo.eval import closed_loop
from examples.demo.motion import examine_motion, find_ceiling
from examples.demo.settings import Experiment
from examples.demo.stages import Job, Progress, run_jobs
from examples.metaworld_sim import find_gl
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import read_json

Stage = Callable[[str, Sequence[Job]], list[Path]]


def open_stages(title: str, cache: Path, workers: int) -> Stage:
    """A function that runs the missing jobs of a stage and returns the folders of all."""

    def stage(name: str, jobs: Sequence[Job]) -> list[Path]:
        return run_jobs(f"{title}: {name}", jobs, cache, workers)

    return stage


def run_missing(settings: Any, arms: Sequence[str], run_seed: Callable[[Any, str, int, list[str]], list[Row]]) -> None:
    """Run the arms that the rows of a study lack, seed by seed, and add their rows.

    Args:
        settings: of the study: an experiment with `seeds`, `regimes`, `cache`, `rows` and `same()`.
        arms: the ones that it should have.
        run_seed: settings, regime, seed, arms -> rows.
    """
    find_gl()
    settings = dataclasses.replace(settings, cache=settings.cache.resolve())
    for seed in settings.seeds:
        for regime in settings.regimes:
            run = functools.partial(run_seed, settings, regime, seed)
            append_missing(settings.rows, regime, seed, settings.same(), arms, run)
    print(f"rows: {settings.rows}")


def record(s: Experiment, seed: int, stage: Stage) -> list[Path]:
    """Demonstrations, held-out ones and play of each task."""
    counts = {"demos": s.demos, "heldout": s.heldout, "play": s.play}
    settings = {"counts": counts, "play_steps": s.play_steps, "seed": seed}
    return stage(
        "record",
        [Job(f"record-{task}", collect, {"task": task, **settings}, sum(counts.values())) for task in s.tasks],
    )


def random_lam(folder: Path, progress: Progress, *, steps: int, seed: int) -> None:
    """A LAM that is not trained. A job, and so not in __main__, which worker processes do not import."""
    torch.manual_seed(seed)
    LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=steps // 4)).save_pretrained(folder / "lam")
    progress(1)


def random_vit(folder: Path, progress: Progress, *, width: int, seed: int) -> None:
    """A small ViT that is not trained, 64 tokens of a frame of 64 pixels. A job.

    Args:
        folder: gets `vit/`.
        progress: called once.
        width: of its tokens, a multiple of 24.
        seed: of its weights.
    """
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=64, patch_size=8, hidden_size=width, num_hidden_layers=3, num_attention_heads=width // 24,
        intermediate_size=2 * width,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder / "vit")
    progress(1)


def measure_motions(
    s: Experiment, episodes: int, lams: Mapping[str, Path], stage: Stage, *, seed: int, distractors: bool, folds: int,
    widths: Sequence[int] = (), rates: Sequence[float] = (),
) -> dict[str, Row]:  # fmt: skip
    """What latent action models hold of the hand's motion, on play that none learnt from; the end of a row for each.

    Args:
        s: the experiment.
        episodes: of play per task.
        lams: folders of the models by name.
        stage: runs jobs.
        seed: of the run.
        distractors: whether frames have distractors.
        folds: see :func:`~examples.demo.motion.find_ceiling`.
        widths: likewise.
        rates: likewise.
    """
    world = {"seed": seed, "distractors": distractors}
    recording = {"episodes": episodes, "play_steps": s.play_steps, "seed": seed}
    play = stage(
        "held-out play",
        [Job(f"record-play-{task}", collect_heldout_play, {"task": task, **recording}, episodes) for task in s.tasks],
    )
    training = {"folds": folds, "widths": list(widths), "rates": list(rates)}
    (ceiling,) = stage("ceiling", [Job("ceiling", find_ceiling, {"play": play, **training, **world}, 1)])
    measuring = {"play": play, "ceiling": ceiling, **world}
    jobs = [Job(f"motion-{name}", examine_motion, {**measuring, "lam": lam}, 1) for name, lam in lams.items()]
    return {
        name: {
            "ceiling": read_json(ceiling / "ceiling.json"),
            "motion": read_json(folder / "motion.json"),
            "environment": environment("metaworld", "mujoco"),
        }
        for name, folder in zip(lams, stage("motion", jobs))
    }


def act(
    s: Experiment, policies: Mapping[str, Path], world: Mapping[str, Any], stage: Stage
) -> dict[str, dict[str, str]]:
    """Let policies act in each task; returns by policy and task the outcomes of the episodes, "1" for solved."""
    settings = {
        "policies": policies, "episodes": s.episodes, "filmed": 0, "max_steps": s.max_steps, "execute": s.execute, **world,
    }  # fmt: skip
    folders = stage(
        "act",
        [
            Job(f"act-{task}", closed_loop, {"task": task, "task_index": index, **settings}, s.episodes * len(policies))
            for index, task in enumerate(s.tasks)
        ],
    )
    outcomes = [torch.load(folder / "success.pt", weights_only=True) for folder in folders]
    return {
        name: {task: "".join(str(int(x)) for x in found[name]) for task, found in zip(s.tasks, outcomes)}
        for name in policies
    }
