"""The recorded runs of the examples: the demo's, for the front page, and refine_lam's, for the guide of the LAM."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from benchmarks import RESULTS
from benchmarks.markdown import bullets, paragraph
from examples.demo import report as demo_report
from examples.refine_lam import report as refine_report
from examples.refine_lam.results import LAMS, WORLDS
from lara_adapter.storage.files import read_json

DEMO = read_json(RESULTS / "quickstart" / "results.json")
REFINE = read_json(RESULTS / "refine_lam" / "results.json")


def demo() -> str:
    """What the demo prints of its record, without the check of its adapter."""
    orders = {
        "policies": demo_report.ARMS,
        "latent_action_models": demo_report.LAMS,
        "r2_over_control": demo_report.LAMS,
    }
    results = {
        **DEMO,
        **{key: {name: DEMO[key][name] for name in names if name in DEMO[key]} for key, names in orders.items()},
    }
    printed, _, _ = demo_report.as_text(results).rpartition("\n\n")
    return f"```text\n{printed}\n```"


def refine() -> str:
    """The tables of refine_lam, and their reading."""
    cells = {}
    for world in WORLDS:
        head, *rows = refine_report.table([row for row in REFINE["rows"] if row["world"] == world])
        for name, *values in rows:
            cells[world] = {**cells.get(world, {}), **{(name, title): text for title, text in zip(head[1:], values)}}

    def read(world: str, arm: str, title: str) -> str:
        return cells[world][LAMS.get(arm, arm), title].partition(" (")[0]

    def noisy(arm: str, title: str) -> str:
        return read("distractors", arm, title)

    def clean(arm: str, title: str) -> str:
        return read("clean", arm, title)

    errors = sorted(
        text.partition(" (")[0] for (_, title), text in cells["clean"].items() if title == "error on labels" and text
    )
    probe, label, error, success = "probe R2", "label R2", "error on labels", "Moto-GPT success"
    reading = bullets(
        f"""**With distractors a linear probe reads more of the action after LARA, most with the contrastive form**:
        probe R2 {noisy("contrastive", probe)} and cosine {noisy("cosine", probe)}, control
        {noisy("control", probe)} (more steps alone do not do it); actions decoded from z
        {noisy("contrastive", label)}, {noisy("cosine", label)} and {noisy("control", label)}. Most of what the
        probe reads is where the hand is, not how it moves: on the demo's seed a pair of two equal frames has .66 of
        .83 (control: .59 of .63). **Without them there is little to gain**: {clean("contrastive", probe)},
        {clean("cosine", probe)} and {clean("control", probe)}.""",
        f"""**Its labels are the best of the four, and still no gain**: with distractors a policy's error on them is
        {noisy("contrastive", error)} (control {noisy("control", error)}, cosine {noisy("cosine", error)}), but
        {noisy("labelled only", error)} with the labelled demonstrations alone, and
        {noisy("true labels (ceiling)", error)} with true labels. Without distractors all lie between {errors[0]}
        and {errors[-1]}.""",
        f"""**Moto-GPT: no clear gain**. Success with distractors {noisy("contrastive", success)} (contrastive),
        {noisy("cosine", success)} (cosine), {noisy("control", success)} (control),
        {noisy("no latent tokens", success)} without latent tokens; without distractors
        {clean("contrastive", success)}, {clean("cosine", success)}, {clean("control", success)} and
        {clean("no latent tokens", success)}. The cosine's lead there is over the control, of which the plain LAM's
        {clean("plain", success)} is as far; three seeds of 20 episodes do not settle it. At this size the paper's
        Table 3 is not reproduced.""",
    )
    legend = paragraph(
        """Probe: mean movement of a chunk. MI: one code with the kind of movement within its task, a lower bound
        judged on episodes left out. Error: mean squared, first 8 actions, held-out. On labels: policies from 10
        labelled and 25 decoded demonstrations per task. No policy sees the state."""
    )
    return f"{refine_report.as_markdown(REFINE)}\n\n{legend}\n\n{reading}"


SECTIONS = {"docs/demo.md": {"demo": demo}, "docs/latent-action-models.md": {"refine": refine}}


def problems() -> Iterator[str]:
    """Rows of refine_lam that are not there for every LAM, or whose numbers contradict each other."""
    rows, settings = REFINE["rows"], REFINE["settings"]
    keys = Counter((row["world"], row["seed"], row["arm"], row["measure"]) for row in rows)
    measured = {(world, seed, measure) for world, seed, _, measure in keys}
    for world, seed, measure in sorted(measured):
        if any(keys[world, seed, arm, measure] != 1 for arm in LAMS):
            yield f"refine_lam: {world}, seed {seed}, {measure}: not one row for each LAM"
    for row in rows:
        right = True
        if "r2" in row:
            low, high = row["interval"]
            right &= low <= row["r2"] <= high <= 1
            right &= math.isclose(row["r2"], 1 - sum(row["errors"]) / sum(row["variances"]), rel_tol=1e-6)
        if "solved" in row:
            outcomes = [outcome for task in settings["tasks"] for outcome in row["solved"][task]]
            right &= len(outcomes) == len(settings["tasks"]) * settings["episodes"]
            right &= math.isclose(row["success"], sum(outcomes) / len(outcomes), rel_tol=1e-6)
        if row["measure"] == "information":
            right &= math.isclose(row["corrected"], row["plug_in"] - row["permuted"], rel_tol=1e-6, abs_tol=1e-9)
            right &= row["held_out"] <= row["entropy"] <= 3
        if not right:
            yield f"refine_lam: {row['world']}, seed {row['seed']}, {row['arm']}, {row['measure']}: contradicts itself"
