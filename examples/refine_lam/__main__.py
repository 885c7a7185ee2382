"""Is a latent action model (LAM) a better labeller after LARA? `python -m examples.refine_lam --preset smoke`.

Four LAMs: plain (video alone), control (trained on for the same steps on the same labelled demonstrations), LARA-LAM
by the paper's cosine, and LARA-LAM by the contrastive form. For each seed, with distractors in every frame and without:

1. A linear probe reads the true action from z, and the codes' mutual information with it is estimated.
2. A small Moto-GPT learns each LAM's tokens from video without actions, is fine-tuned on the few labelled demonstrations
   and acts (the shape of the paper's Table 3).
3. A linear head fitted on the labelled demonstrations decodes actions from z for the unlabelled ones. A diffusion policy
   learns from both and acts; beside it labelled demonstrations only, and true labels as the ceiling.

All arms of a seed share data, order, initial weights, starts of the evaluation and sampling noise. Results are written
after each stage, a run that was killed resumes where it stopped, and `--report FOLDER` prints the results of a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from examples.demo.cli import exit_status, read_presets
from examples.demo.stages import Job, run_jobs
from examples.metaworld_sim import find_gl
from examples.refine_lam import report, results
from examples.refine_lam.settings import PRESETS, Settings
from examples.refine_lam.stages import Jobs


def read_settings(arguments: list[str]) -> Settings:
    """Read the command line; see :func:`read_presets`."""
    return read_presets(Settings, PRESETS, arguments, str(__doc__))


def run_seed(settings: Settings, seed: int, distractors: bool) -> None:
    """Run the unfinished stages of one seed in one world, and add its rows to the results.

    Args:
        settings: of the run.
        seed: of everything.
        distractors: whether frames have distractors.
    """
    cache, jobs = settings.output / "cache", Jobs(settings, seed, distractors)
    world = "distractors" if distractors else "clean"

    def stage(title: str, stage_jobs: dict[str, Job]) -> dict[str, Path]:
        folders = run_jobs(f"{world} {seed}: {title}", list(stage_jobs.values()), cache, settings.workers)
        return dict(zip(stage_jobs, folders))

    def add(rows: list[results.Row]) -> None:
        results.add_rows(settings, [{"world": world, "seed": seed, **row} for row in rows])

    recording = {task: jobs.record(task) for task in settings.tasks}
    recording |= {f"{task}, unlabelled": jobs.record_unlabelled(task) for task in settings.tasks}
    recorded = list(stage("record", recording).values())
    data, unlabelled = recorded[: len(settings.tasks)], recorded[len(settings.tasks) :]

    # the jobs that need no LAM run beside the first one
    first = {
        "plain": jobs.plain(data),
        "no_tokens": jobs.moto_gpt("no_tokens", data, unlabelled, None),
        "labelled_only": jobs.policy("labelled_only", data, unlabelled, None, use_unlabelled=False),
        "true_labels": jobs.policy("true_labels", data, unlabelled, None),
    }
    trained = stage("plain LAM", first)
    lam = trained["plain"] / "lam"
    refining = {"cosine": jobs.joint("cosine", data, lam), "contrastive": jobs.joint("contrastive", data, lam)}
    refined = stage("refine", {**refining, "control": jobs.control(data, lam)})
    lams = {"plain": lam, **{arm: refined[arm] / "lam" for arm in ("control", "cosine", "contrastive")}}

    measuring = {f"label {arm}": jobs.label(arm, data, unlabelled, folder) for arm, folder in lams.items()}
    measuring |= {f"probe {arm}": jobs.probe(arm, data, folder) for arm, folder in lams.items()}
    measured = stage("label", measuring)
    labels = {arm: measured[f"label {arm}"] for arm in lams}
    for arm in lams:
        add(results.lam_rows(arm, measured[f"probe {arm}"], labels[arm]))

    learning = {arm: jobs.moto_gpt(arm, data, unlabelled, folder) for arm, folder in labels.items()}
    moto = {"no_tokens": trained["no_tokens"], **stage("Moto-GPT", learning)}
    add(results.training_rows("moto_gpt_error", moto))
    learning = {arm: jobs.policy(arm, data, unlabelled, folder) for arm, folder in labels.items()}
    pseudo = {arm: trained[arm] for arm in ("labelled_only", "true_labels")} | stage("on labels", learning)
    add(results.training_rows("pseudo_policy_error", pseudo))

    files = {f"moto_gpt {arm}": folder / "moto_gpt.pt" for arm, folder in moto.items()}
    files |= {f"pseudo_policy {arm}": folder / "policy.pt" for arm, folder in pseudo.items()}
    evaluated = stage("closed loop", {task: jobs.closed_loop(task, files) for task in settings.tasks})
    add(results.acting_rows({"moto_gpt": moto, "pseudo_policy": pseudo}, evaluated))


def run(settings: Settings) -> str:
    """Run all seeds, with distractors first, and write the results.

    Args:
        settings: of the run.

    Returns:
        The tables and their interpretation.
    """
    worlds = {"both": [True, False], "distractors": [True], "clean": [False]}[settings.worlds]
    for distractors in worlds:
        for seed in settings.seeds:
            run_seed(settings, seed, distractors)
    return report.write(settings.output)


def main() -> int:
    """Run the example; returns the exit status."""
    settings = read_settings(sys.argv[1:])

    def work() -> str | None:
        if settings.report is not None:
            print(report.write(settings.report, markdown=settings.markdown))
            return None
        results.check(settings)
        gl = find_gl()
        print(f"Refining a LAM, preset {settings.preset}, rendering with {gl}, results in {settings.output}/")
        print(f"\n{run(settings)}\n")
        return f"Results and picture: {settings.output}/results.json, refine_lam.png"

    return exit_status(work, results.ResultsUnusable)


if __name__ == "__main__":
    sys.exit(main())
