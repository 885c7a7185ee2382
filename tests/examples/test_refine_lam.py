"""examples.refine_lam from end to end: a smoke run that is killed half-way resumes and gives the same rows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tyro")

ROOT = Path(__file__).resolve().parents[2]
LAMS = {"plain", "control", "cosine", "contrastive"}


FEW = tuple(word for name in ("lam", "joint", "pretrain", "finetune", "policy") for word in (f"--{name}-steps", "4"))


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.refine_lam", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )


def finish(*arguments: str) -> str:
    run = start(*arguments)
    out, _ = run.communicate(timeout=900)
    assert run.returncode == 0, out
    return out


def test_flags_change_the_preset():
    from examples.refine_lam.__main__ import PRESETS, read_settings

    assert read_settings([]) == PRESETS["quick"]
    assert read_settings(["--preset", "smoke"]) == PRESETS["smoke"]
    changed = read_settings(["--preset=smoke", "--seeds", "3", "4", "--worlds", "clean", "--tasks", "drawer-open"])
    assert (changed.seeds, changed.worlds, changed.tasks) == ((3, 4), "clean", ("drawer-open",))
    assert changed.lam_steps == PRESETS["smoke"].lam_steps


@pytest.mark.parametrize(
    "wrong", [{"seeds": ()}, {"seeds": (1, 1)}, {"labelled": 0}, {"execute": 17}, {"seeds": (-1,)}]
)
def test_senseless_settings_are_refused(wrong):
    from examples.refine_lam.settings import Settings

    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}"):
        Settings(**wrong)


def test_all_arms_of_a_seed_share_everything_but_the_lam():
    from examples.refine_lam.settings import PRESETS
    from examples.refine_lam.stages import Jobs

    jobs = Jobs(PRESETS["quick"], 5, distractors=True)
    joint = [jobs.joint(alignment, [Path("d")], Path("l")).settings for alignment in ("cosine", "contrastive")]
    control = jobs.control([Path("d")], Path("l")).settings
    for settings in joint:
        assert {key: settings[key] for key in control} == dict(control)  # data, LAM, steps, batch, rate, world, seed
    options = [settings["lara_options"] for settings in joint]
    assert [option.pop("alignment") for option in options] == ["cosine", "contrastive"]
    assert options[0] == options[1]
    for make in (jobs.moto_gpt, jobs.policy):
        one, two = (make(arm, [Path("d")], [Path("u")], Path(arm)).settings for arm in ("plain", "cosine"))
        assert {k: v for k, v in one.items() if k != "labels"} == {k: v for k, v in two.items() if k != "labels"}
    # unlabelled demonstrations are others, clean and spoilt worlds share recordings
    assert jobs.record_unlabelled("drawer-open").settings["seed"] != jobs.record("drawer-open").settings["seed"]
    assert jobs.record("drawer-open") == Jobs(PRESETS["quick"], 5, distractors=False).record("drawer-open")


@pytest.mark.gl
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_smoke_run_survives_a_kill_and_gives_the_same_rows_again(gl, tmp_path):
    output = tmp_path / "refine"
    results = output / "results.json"
    arguments = (
        "--preset",
        "smoke",
        "--tasks",
        "drawer-open",
        "--episodes",
        "1",
        "--workers",
        "1",
        "--max-steps",
        "8",
        *FEW,
        "--output",
        str(output),
    )
    run = start(*arguments)
    deadline = time.monotonic() + 900
    while not results.is_file() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    run.kill()
    run.communicate()
    before = json.loads(results.read_text())["rows"]  # whole, whenever the kill came
    assert before
    assert not any(row["measure"] == "moto_gpt" for row in before)  # it was killed before its end

    out = finish(*arguments)
    rows = json.loads(results.read_text())["rows"]
    assert all(row in rows for row in before)
    found = {(row["arm"], row["measure"]) for row in rows}
    measures = {"probe", "chunk_probe", "information", "health", "attention", "pseudo_labels"}
    acting = ("moto_gpt", "moto_gpt_error"), ("pseudo_policy", "pseudo_policy_error")
    expected = {(arm, measure) for arm in LAMS for measure in (*measures, *acting[0], *acting[1])}
    expected |= {("no_tokens", measure) for measure in acting[0]}
    expected |= {(arm, measure) for arm in ("labelled_only", "true_labels") for measure in acting[1]}
    assert found == expected
    assert len(rows) == len(found)
    assert (output / "refine_lam.png").read_bytes()[:4] == b"\x89PNG"
    assert "LARA-LAM, contrastive" in out

    # what is computed anew comes out the same
    anew = ("label-contrastive", "moto-gpt-contrastive", "policy-contrastive", "closed-loop-drawer")
    for folder in (output / "cache").glob("*"):
        if folder.name.startswith(anew):
            shutil.rmtree(folder)
    finish(*arguments)
    assert json.loads(results.read_text())["rows"] == rows
    shutil.rmtree(output / "cache")  # the report needs the results alone
    table = finish("--report", str(output))
    assert table.strip() in out
