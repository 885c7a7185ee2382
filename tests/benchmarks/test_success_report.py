"""The statistics of the success rows, on rows whose truth is known; and that rows survive a kill."""

import json
import sys

import numpy as np
import pytest

from benchmarks.success import libero_report, report
from benchmarks.success.arms import ARMS, CONTROL, DEFAULTS, STAGES
from benchmarks.success.rows import append_missing, append_row, read_rows


def row(seed, arm, rate, r2=0.5, regime="distractors", episodes=50, demos=10):
    random = np.random.default_rng([seed, len(arm)])
    outcome = ["".join(str(int(x < rate)) for x in random.random(episodes)) for _ in range(2)]
    solved = dict(zip(("a", "b"), outcome))
    lam = {"r2": r2, "codes_used": 9, "mean_direction": 0.5, "reconstruction_over_copy": 0.6}
    return {
        "seed": seed, "arm": arm, "regime": regime, "solved": solved, "action_error": 0.05, "lam": lam,
        "settings": {"demos": demos, "tasks": ["a", "b"]},
    }  # fmt: skip


def test_the_t_interval_is_students():
    # scipy.stats.ttest_1samp([1, 2, 3, 4], 0).confidence_interval(): 0.446 to 4.554
    low, high = report.t_interval([1.0, 2.0, 3.0, 4.0])
    assert low == pytest.approx(0.4457, abs=1e-3)
    assert high == pytest.approx(4.5543, abs=1e-3)
    assert report.t_interval([1.0]) is None


def test_a_real_difference_is_found_and_none_is_not():
    same = {(seed, arm): row(seed, arm, 0.6) for seed in range(8) for arm in ("dit_only", "cosine")}
    better = {
        (seed, arm): row(seed, arm, rate) for seed in range(8) for arm, rate in (("dit_only", 0.3), ("cosine", 0.8))
    }
    for rows, found in ((same, False), (better, True)):
        gain = report.summarise(rows)["cosine"]["success_gain"]
        assert (gain["t"][0] > 0) is found
        assert (gain["bootstrap"][0] > 0) is found
        assert gain["seeds"] == 8


def test_pairs_are_of_one_seed():
    # seeds differ much, arms hardly: only a paired interval sees the difference
    rows = {}
    for seed in range(6):
        for arm, more in (("control", 0.0), ("contrastive", 0.1 + 0.001 * seed)):
            rows[seed, arm] = row(seed, arm, 0.5, r2=seed / 10 + more)
    gain = report.summarise(rows)["contrastive"]["probe_gain"]
    assert gain["mean"] == pytest.approx(0.1025)
    assert gain["t"][0] > 0.09
    del rows[5, "control"]
    assert report.summarise(rows)["contrastive"]["probe_gain"]["seeds"] == 5


def test_regimes_and_demonstrations_are_apart_and_settings_never_mixed():
    rows = [row(0, "dit_only", 0.5), row(0, "dit_only", 0.5, regime="clean"), row(0, "dit_only", 0.5, demos=3)]
    assert set(report.group_rows(rows)) == {
        "distractors, 2 tasks, 10 demonstrations each",
        "clean, 2 tasks, 10 demonstrations each",
        "distractors, 2 tasks, 3 demonstrations each",
    }
    larger = {**row(0, "dit_only", 0.5), "settings": {**row(0, "dit_only", 0.5)["settings"], "width": 256, "depth": 8}}
    assert "distractors, 2 tasks, 10 demonstrations each, a policy of width 256 and depth 8" in report.group_rows(
        [larger]
    )
    rows.append({**row(1, "dit_only", 0.5), "settings": {"demos": 10, "tasks": ["a", "b"], "lr": 1.0}})
    with pytest.raises(ValueError, match="different settings"):
        report.group_rows(rows)


def test_the_report_is_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = [row(seed, arm, 0.5) for seed in range(2) for arm in ("dit_only", "contrastive", "control")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"cut sh')
    monkeypatch.setattr(sys, "argv", ["report", "--rows", str(tmp_path / "rows.jsonl")])
    confirm = [row(seed, arm, 0.5) for seed in (8, 9, 10) for arm in ("dit_only", "contrastive")]
    (tmp_path / "rows-confirm.jsonl").write_text("".join(json.dumps(r) + "\n" for r in confirm))
    assert report.main() == 0
    assert "would be found with 80 %" in capsys.readouterr().out
    assert (tmp_path / "success.png").stat().st_size > 5000
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["distractors, 2 tasks, 10 demonstrations each"]["contrastive"]["seeds"] == 2
    # the confirmation's seeds are not mixed with those that suggested it
    assert summary["distractors, 2 tasks, 10 demonstrations each, confirmation"]["contrastive"]["seeds"] == 3


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    append_row(path, {"seed": 0})
    with path.open("a") as stream:
        stream.write('{"seed": 1, "so')
    append_row(path, {"seed": 2})
    assert read_rows(path) == [{"seed": 0}, {"seed": 2}]


@pytest.mark.long
def test_each_ablation_is_held_against_the_arm_it_changes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks.success import pictures as success_pictures

    rows = {}
    for seed in range(3):
        for arm, r2 in (("contrastive", 0.8), ("cosine", 0.4), (CONTROL, 0.5), ("dit_only", 0.0)):
            rows[seed, arm] = row(seed, arm, 0.5, r2=r2 + seed / 100)
        for arm in STAGES["ablations"]:
            rows[seed, arm] = row(seed, arm, 0.5, r2=0.7 + seed / 100)
        for arm in STAGES["cosine_depth"]:
            rows[seed, arm] = row(seed, arm, 0.5, r2=0.3 + seed / 100)
    del rows[2, "w1=0.01"]
    summary = report.summarise(rows)
    assert summary["layer=1"]["change"]["r2"]["mean"] == pytest.approx(-0.1)
    assert summary["cosine, layer=1"]["change"]["r2"]["mean"] == pytest.approx(-0.1)
    assert "change" not in summary["cosine"]
    table = report.ablation_table(summary)
    assert table.count("\n") == 1 + len(STAGES["ablations"]) + len(STAGES["cosine_depth"])
    assert "layer=1" not in report.table(summary)
    points = report.ablation_points(rows)
    assert points["probe R2"]["layer"]["2"] == pytest.approx([0.8, 0.81, 0.82])  # the unchanged arm is on each line
    assert sorted(points["probe R2"]["cosine, layer"]) == ["0", "1", "2", "3", "4"]
    assert len(points["success"]["w1"]["0.1"]) == 2  # only seeds that have all of a knob
    # one arm on more seeds than the others: the dashed line is of the seeds of the dots
    more = {**rows, (7, "dit_only"): row(7, "dit_only", 0.0), (7, "w1=1.0"): row(7, "w1=1.0", 0.5)}
    assert report.references(more)["success"] == report.references(rows)["success"]
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    success_pictures.ablations(points, report.references(rows), tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").stat().st_size > 5000
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles[:9] == [*DEFAULTS, "cosine, layer"]  # the upper row says which knob a column is


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.options is not None])
def test_every_arm_is_something_that_attach_lara_takes(name):
    from examples.mini_vla import MiniVLA
    from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara

    lara = attach_lara(MiniVLA(), LatentActionModel(LatentActionConfig.tiny()), **{"layer": -3, **ARMS[name].options})
    knob, _, value = name.removeprefix("cosine, ").partition("=")
    if knob == "layer":
        assert lara.config.layer == int(value)
    if knob in ("w1", "w2"):
        assert {"w1": lara.config.align_weight, "w2": lara.config.lam_weight}[knob] == float(value)


def test_rows_of_the_usual_size_say_nothing_of_it():
    pytest.importorskip("tyro")
    from benchmarks.success import __main__ as success

    recorded = read_rows(report.ROWS)[0]["settings"]
    assert json.loads(json.dumps(success.Settings().same())) == recorded  # so the committed rows are never run again
    assert success.Settings(width=256, depth=8).same() == {**success.Settings().same(), "width": 256, "depth": 8}


def test_seeds_that_only_have_a_lam_are_counted_apart(monkeypatch):
    rows = []
    for seed in range(5):
        for arm in ("before", CONTROL, "dit_only", "frozen", "cosine", "contrastive"):
            new = row(seed, arm, 0.8 if arm == "contrastive" else 0.3, regime="libero_object", demos=20)
            new["lam"] |= {"play_r2": 0.4 + 0.1 * (arm == "cosine"), "still_r2": 0.05}
            if seed > 2 or arm in ("before", CONTROL):
                del new["solved"]
            if arm in ("before", CONTROL):
                del new["action_error"]
            if arm == "dit_only":
                del new["lam"]
            rows.append(new)
    monkeypatch.setattr(libero_report, "read_rows", lambda path: rows)
    libero_report.recorded.cache_clear()
    try:
        text, said = libero_report.section(), libero_report.reading()
    finally:
        libero_report.recorded.cache_clear()
    assert "| cosine | 3 of 5 |" in text
    assert "| cosine | 5 | 0.50 | 0.05 | +0.10 (+0.10 to +0.10) |" in text
    assert "SD of 3 seeds" in text
    assert "20 demonstrations, 3 seeds" in said
    gained = float(said.partition("contrastive ")[2].split()[0])
    assert 40 < gained < 60


def test_only_missing_arms_are_run_and_no_row_is_added_twice(tmp_path):
    path, ran = tmp_path / "rows.jsonl", []
    settings = {"demos": 10, "tasks": ("a", "b")}  # a tuple: JSON gives it back as a list

    def run(arms):
        ran.append(arms)
        return [row(0, arm, 0.5) for arm in ("before", *arms)]

    for arms in (["dit_only"], ["dit_only", "cosine"], ["dit_only", "cosine"]):
        append_missing(path, "distractors", 0, settings, arms, run)
    assert ran == [["dit_only"], ["cosine"]]
    assert [each["arm"] for each in read_rows(path)] == ["before", "dit_only", "cosine"]
