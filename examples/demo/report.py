"""Results of a demo run: results.json, report.md, the pictures, and the tables for the terminal."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.demo import page, pictures
from examples.demo.probe import Probe, r2_interval
from examples.demo.tables import Rows, aligned, markdown_table, wrapped
from lara_adapter.evaluation import wilson_interval
from lara_adapter.storage.files import read_json, replace_file, write_json

ARMS = {
    "dit_only": "DiT only (no LARA)",
    "frozen_lam": "frozen LAM",
    "lara_cosine": "LARA, cosine (the paper)",
    "lara_contrastive": "LARA, contrastive",
}
LAMS = {
    "before": "before: video only",
    "control": "control: more LAM steps",
    "lara_cosine": "LARA, cosine",
    "lara_contrastive": "LARA, contrastive",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The folders of a finished run.

    Attributes:
        output: where results are written.
        settings: of the run.
        timings: of each job, see `Job.timing`.
        trained: folder of each policy, of the first LAM and of the control.
        evaluated: folder of each task's closed-loop episodes.
        examined: folder of each LAM's measurements on demonstrations.
        motion: folder of each LAM's measurements on play.
        reloaded: folder of the check that reloads the adapter.
    """

    output: Path
    settings: Mapping[str, Any]
    timings: Mapping[str, Mapping[str, float]]
    trained: Mapping[str, Path]
    evaluated: Mapping[str, Path]
    examined: Mapping[str, Path]
    motion: Mapping[str, Path]
    reloaded: Path


def summarise(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run.

    Args:
        run: the finished run.

    Returns:
        The content of results.json.
    """
    reloaded = read_json(run.reloaded / "reloaded.json")
    policies = {}
    for arm in ARMS:
        tasks = {}
        for task, folder in run.evaluated.items():
            outcomes = torch.load(folder / "success.pt", weights_only=True)[arm]
            tasks[task] = {"solved": int(outcomes.sum()), "episodes": len(outcomes)}
        solved, episodes = (sum(task[key] for task in tasks.values()) for key in ("solved", "episodes"))
        total = {"solved": solved, "episodes": episodes}
        for counts in (*tasks.values(), total):
            counts["interval"] = list(wilson_interval(counts["solved"], counts["episodes"]))
        error = read_json(run.trained[arm] / "action_error.json")["action_error"]
        policies[arm] = {"tasks": tasks, "total": total, "action_error": error}
    models = {name: read_json(folder / "measured.json") for name, folder in run.examined.items()}
    probes = {
        name: Probe(**torch.load(folder / "probe.pt", weights_only=True)) for name, folder in run.examined.items()
    }
    over_control = {
        name: {
            "difference": models[name]["r2"] - models["control"]["r2"],
            "interval": list(r2_interval(probes[name], probes["control"])),
        }
        for name in models
        if name not in ("before", "control")
    }
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    return {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in run.settings.items()},
        "machine": machine,
        "policies": policies,
        "latent_action_models": models,
        "motion": {name: read_json(folder / "motion.json") for name, folder in run.motion.items()},
        "r2_over_control": over_control,
        "adapter": reloaded,
        "took": dict(run.timings),
    }


def write(run: Run) -> str:
    """Write tables, pictures, rollouts and the adapter to the output folder.

    Args:
        run: the finished run.

    Returns:
        The tables and their interpretation, for the terminal.
    """
    results = summarise(run)
    kept = {name: torch.load(folder / "pictures.pt", weights_only=True) for name, folder in run.examined.items()}
    histories = {name: read_json(folder / "history.json") for name, folder in run.trained.items()}
    pictures.draw_curves(
        run.output / "curves.png",
        histories["before"],
        {name: histories[name] for name in ("control", *ARMS)},
        {**LAMS, **ARMS},
    )
    pictures.draw_motion(run.output / "motion.png", results["motion"], LAMS)
    pictures.draw_probe(run.output / "probe.png", results["latent_action_models"], LAMS)
    pictures.draw_predictions(run.output / "predictions.png", kept, LAMS)
    pictures.draw_attention(run.output / "attention.png", kept, LAMS)
    (run.output / "rollouts").mkdir(exist_ok=True)
    for arm in results["policies"]:
        films, outcomes = [], []
        for folder in run.evaluated.values():
            film = torch.load(folder / "film.pt", weights_only=True)[arm]
            films += film
            outcomes += torch.load(folder / "success.pt", weights_only=True)[arm][: len(film)].tolist()
        pictures.write_rollout(run.output / "rollouts" / f"{arm}.gif", films, outcomes, ARMS[arm])
    shutil.copytree(run.trained["lara_contrastive"] / "adapter", run.output / "adapter", dirs_exist_ok=True)
    write_json(run.output / "results.json", results)
    with replace_file(run.output / "report.md") as fresh:
        fresh.write_text(as_markdown(results), encoding="utf-8")
    tables = {
        "Policies": _policy_rows(results),
        "Motion": _motion_rows(results),
        "Latent action models": _lam_rows(results),
    }
    page.write(run.output, results, tables, [*_reading(results), *_legend(results)])
    return as_text(results)


# ---------------------------------------------------------------------- tables and text


def _policy_rows(results: Mapping[str, Any]) -> Rows:
    tasks = list(next(iter(results["policies"].values()))["tasks"])
    rows = [["policy", *(f"{task}" for task in tasks), "all (95 % interval)", "action error"]]
    for arm, measured in results["policies"].items():
        cells = [f"{measured['tasks'][task]['solved']}/{measured['tasks'][task]['episodes']}" for task in tasks]
        total = measured["total"]
        low, high = (round(100 * end) for end in total["interval"])
        rate = round(100 * total["solved"] / total["episodes"])
        rows.append([ARMS[arm], *cells, f"{rate} % ({low}-{high})", f"{measured['action_error']:.4f}"])
    return rows


def _motion_rows(results: Mapping[str, Any]) -> Rows:
    shown = {"pair": "z alone", "still": "still pair", "ceiling_beyond": "ceiling", "share_beyond": "share"}
    rows = [["motion of the hand", "R2 beyond the present (95 %)", *shown.values()]]
    for name, targets in results["motion"].items():
        found = targets["displacement"]
        numbers = [f"{found[key]['value']:.2f}" if found[key] else "-" for key in shown]
        rows.append([LAMS[name], _with_interval(found["beyond"]), *numbers])
    return rows


def _with_interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def _lam_rows(results: Mapping[str, Any]) -> Rows:
    head = ["latent action model", "R2 of the action (95 %)", "recon / copy", "codes", "mean dir."]
    rows = [[*head, "on squares", "on motion"]]
    for name, measured in results["latent_action_models"].items():
        low, high = measured["r2_interval"]
        numbers = [f"{measured['r2']:.2f} ({low:.2f} to {high:.2f})", f"{measured['reconstruction_over_copy']:.2f}"]
        numbers += [str(measured["codes_used"]), f"{measured['mean_direction']:.2f}"]
        numbers += [f"x {measured['attention_on_squares']:.2f}", f"x {measured['attention_on_motion']:.2f}"]
        rows.append([LAMS[name], *numbers])
    return rows


def _reading(results: Mapping[str, Any]) -> list[str]:
    """State what the numbers show and what they cannot show."""
    settings, models = results["settings"], results["latent_action_models"]
    before, control = models["before"], models["control"]
    if len(settings["tasks"]) * settings["heldout"] < 10:
        return ["This run is far too short for results: it only shows that every part works."]
    words = _motion_reading(results)
    for name, over in results["r2_over_control"].items():
        low, high = over["interval"]
        verdict = "more" if low > 0 else "less" if high < 0 else "as much (no measurable difference)"
        words.append(
            f"{LAMS[name]}: a linear probe reads {verdict} of the true action from its latent, compared with the control, "
            f"a LAM trained for as many steps without alignment: R2 {control['r2']:.2f} -> {models[name]['r2']:.2f} "
            f"({over['difference']:+.2f}, 95 % {low:+.2f} to {high:+.2f})."
        )
        direction = models[name]["mean_direction"]
        if direction > 0.8 and direction >= before["mean_direction"]:
            words.append(
                f"{LAMS[name]}: its latent has almost the same direction for every pair (mean direction {direction:.3f}, "
                f"before {before['mean_direction']:.3f}). A constant is easy to predict, so its high cosine does not show "
                "alignment."
            )
        if low > 0 and models[name]["attention_on_motion"] > 1.1 * control["attention_on_motion"]:
            words.append(
                f"{LAMS[name]}: it attends to what moves {models[name]['attention_on_motion']:.2f} times as much as "
                f"uniform attention (control: {control['attention_on_motion']:.2f})."
            )
    if "motion" not in results:
        words.append(
            "R2 is not a measure of motion: with the default settings and seed 0 a pair of two equal frames reaches .66 of "
            "the contrastive .83 and .59 of the control's .63, so z mostly learns where the hand is."
        )
    words.append(
        "All arms share data and steps. The intervals cover the choice of held-out demonstrations, not the variation over "
        "seeds."
    )
    if not settings["distractors"]:
        words.append("Distractors are off: only motion changes, so alignment has little to remove.")
    return [*words, _success_reading(results)]


def _motion_reading(results: Mapping[str, Any]) -> list[str]:
    """What the measure of motion says; nothing for results that were written before there was one."""
    if "motion" not in results:
        return []
    found = {name: targets["displacement"] for name, targets in results["motion"].items()}
    words, control = [], found["control"]["beyond"]
    for name in ("lara_cosine", "lara_contrastive"):
        beyond = found[name]["beyond"]
        verdict = (
            "more" if beyond["low"] > control["high"] else "less" if beyond["high"] < control["low"]
            else "as much (the intervals overlap)"
        )  # fmt: skip
        words.append(
            f"{LAMS[name]}: its latent holds {verdict} of the hand's motion, compared with the control: R2 beyond the "
            f"present frame {_with_interval(beyond)}, control {_with_interval(control)}."
        )
    words.append(
        "The probe of the action says less: an expert's action follows from the hand's place, and a latent that holds only "
        "that scores as well."
    )
    return words


def _success_reading(results: Mapping[str, Any]) -> str:
    totals = [measured["total"] for measured in results["policies"].values()]
    episodes = totals[0]["episodes"]
    rates = [total["solved"] / episodes for total in totals]
    low, high = wilson_interval(round(sum(rates) / len(rates) * episodes), episodes)
    error = 100 * (high - low) / 2 / 1.96
    return (
        f"Success rates only check that the policies work: {episodes} episodes of one seed have a standard error of about "
        f"{error:.0f} points, so a difference of two policies is significant from about {1.96 * 2**0.5 * error:.0f} points "
        f"on; these lie within {100 * (max(rates) - min(rates)):.0f}. Whether LARA improves success is not tested here."
    )


def _adapter_lines(results: Mapping[str, Any]) -> list[str]:
    loaded = results["adapter"]
    same = {True: "bit-identical", False: "DIFFERENT"}
    return [
        "The adapter was saved, and loaded onto a new policy with load_lara:",
        f"  actions with and without LARA attached: {same[loaded['actions_identical']]}",
        f"  alignment loss of the trained and the loaded adapter: {same[loaded['alignment_identical']]} "
        f"({loaded['alignment_trained']:.6f})",
    ]


def _legend(results: Mapping[str, Any]) -> list[str]:
    settings = results["settings"]
    motion = []
    if "motion" in results:
        motion.append(
            f"Motion: on {settings['heldout_play']} episodes of play per task that no model saw. R2 beyond the present: "
            "of what z of two equal frames, state and task leave unexplained of the hand's displacement, the share that z "
            "explains. Ceiling: the same for what is trained with these labels on the pixels; share: of it."
        )
    return [
        *motion,
        f"Success: solved episodes of {settings['episodes']} per task, with the same starts and sampling noise for all "
        "policies; 95 % Wilson interval.",
        f"Action error: mean squared error of the first {settings['execute']} sampled actions on held-out demonstrations.",
        "R2 of the action: ridge regression from z_t to the mean movement of the chunk, fitted on the training "
        f"demonstrations, tested on {settings['heldout']} held-out ones per task.",
        f"The task alone gives R2 {results['latent_action_models']['before']['r2_task_only']:.2f}.",
        "Recon / copy: error of the predicted frame over that of copying I_t. Mean dir.: |E[z/|z|]|^2, near 1: collapse.",
        "On squares, on motion: the M-Former's attention there, relative to uniform attention.",
    ]


def as_text(results: Mapping[str, Any]) -> str:
    """Format the results for a terminal."""
    parts = [
        aligned(_policy_rows(results)),
        *([aligned(_motion_rows(results))] if "motion" in results else []),
        aligned(_lam_rows(results)),
        "\n".join(wrapped(line) for line in _legend(results)),
        "Interpretation\n" + "\n".join(wrapped(line) for line in _reading(results)),
        "\n".join(_adapter_lines(results)),
    ]
    return "\n\n".join(parts)


def as_markdown(results: Mapping[str, Any]) -> str:
    """Format the results as report.md, with the pictures."""
    settings, machine = results["settings"], results["machine"]
    settings_text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
    timings = "\n".join(
        f"| {name} | {job['seconds']:.0f} | {job['cpu_seconds']:.0f} |" for name, job in results["took"].items()
    )
    rollouts = "\n".join(f"![{ARMS[arm]}](rollouts/{arm}.gif)" for arm in results["policies"])
    listed = "\n".join(f"- {line}" for line in _reading(results))
    legend = "\n".join(f"- {line}" for line in _legend(results))
    return f"""# LARA demo: results

Preset `{settings["preset"]}`, seed {settings["seed"]}, {machine["cores"]} CPU cores, torch {machine["torch"]}.
w1 = {settings["align_weight"]}, w2 = {settings["lam_weight"]} (the paper: 0.01 each, over 20k to 50k steps).

## Interpretation

{listed}

## Policies

{markdown_table(_policy_rows(results))}

## Motion

{markdown_table(_motion_rows(results))}

![Motion](motion.png)

## Latent action models

{markdown_table(_lam_rows(results))}

![R2 of the action](probe.png)

{legend}

## Training

![curves](curves.png)

## What the forward dynamics model predicts

![predictions](predictions.png)

## Where the M-Former looks (LARA, Fig. 5)

![attention](attention.png)

## Rollouts

The first episodes of each task; in the corner the policy's input.

{rollouts}

## The adapter

    {chr(10).join(_adapter_lines(results)).replace(chr(10), chr(10) + "    ")}

Output of `lara.check(batch, optimizer)`:

    {results["adapter"]["check"].replace(chr(10), chr(10) + "    ")}

## Settings

{settings_text}

Jobs run in parallel, one thread each; where the columns differ, the machine was shared.

| job | seconds | CPU seconds |
|---|---:|---:|
{timings}
"""
