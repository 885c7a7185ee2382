"""Rows, intervals and tables of refine_lam.py."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("matplotlib")

from examples.refine_lam import report, results
from examples.refine_lam.settings import PRESETS
from examples.refine_lam.statistics import (
    difference_interval,
    interval_of_mean,
    over_demonstrations,
    paired_bootstrap,
    t_quantile,
)
from lara_adapter.evaluation import wilson_interval

SETTINGS = PRESETS["smoke"]


def policy_row(world: str, seed: int, arm: str, measure: str, solved: list[int]) -> dict:
    shares = {"drawer-open": solved, "button-press-topdown": solved[::-1]}
    rate = sum(solved) / len(solved)
    return {"world": world, "seed": seed, "arm": arm, "measure": measure, "success": rate, "solved": shares}


def make_rows(worlds: tuple[str, ...] = ("distractors",), seeds: int = 3) -> list[dict]:
    rows = []
    for world in worlds:
        for seed in range(seeds):
            for number, arm in enumerate(results.LAMS):
                mine = {"world": world, "seed": seed, "arm": arm}
                rows += [
                    {**mine, "measure": "probe", "r2": 0.5 + 0.1 * number + 0.01 * seed, "interval": [0.4, 0.9]},
                    {**mine, "measure": "information", "held_out": 0.1 * number},
                    {
                        **mine,
                        "measure": "health",
                        "codes_used": 100 + seed,
                        "mean_direction": 0.9,
                        "reconstruction_over_copy": 0.5,
                    },
                    {**mine, "measure": "pseudo_labels", "r2": 0.3 + 0.1 * number},
                    {**mine, "measure": "moto_gpt_error", "action_error": 0.2 - 0.01 * number},
                    policy_row(world, seed, arm, "moto_gpt", [1] * number + [0] * (4 - number)),
                    policy_row(world, seed, arm, "pseudo_policy", [1, 0, 1, 0]),
                ]
            rows += [policy_row(world, seed, "no_tokens", "moto_gpt", [0, 0, 0, 0])]
            for arm in ("labelled_only", "true_labels"):
                rows.append(policy_row(world, seed, arm, "pseudo_policy", [1, 1, 1, 0]))
    return rows


def test_student_quantiles():
    assert t_quantile(2) == pytest.approx(4.3027)
    assert t_quantile(11) == pytest.approx(2.2010, abs=1e-3)
    assert t_quantile(120) == pytest.approx(1.9799, abs=1e-4)
    low, high = interval_of_mean([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5))
    assert interval_of_mean([1.0]) == (None, None)


def test_differences_are_paired_by_seed():
    mean, low, high = difference_interval({0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.5, 0: 0.5})
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert difference_interval({0: 1.0}, {1: 1.0}) == (None, None, None)


def test_bootstrap_of_success_keeps_pairs_together():
    rows = [policy_row("clean", seed, "a", "m", [1, 0, 1, 1]) for seed in range(3)]
    rows += [policy_row("clean", seed, "b", "m", [1, 0, 1, 1]) for seed in range(3)]
    rows += [policy_row("clean", seed, "c", "m", [0, 1, 0, 0]) for seed in range(3)]
    assert paired_bootstrap(rows, "a", "b", "m") == (0, 0)  # the same episodes solved: no doubt, whatever the rate
    low, high = paired_bootstrap(rows, "a", "c", "m")
    assert low < 0.5 < high  # the mean of +1 -1 +1 +1
    assert low > 0


def test_rows_are_added_replaced_and_kept_in_order(tmp_path):
    settings = dataclasses.replace(SETTINGS, output=tmp_path / "out")
    rows = make_rows(seeds=1)
    results.add_rows(settings, rows[3:])
    results.add_rows(settings, rows[:4])
    first = (tmp_path / "out" / "results.json").read_bytes()
    results.add_rows(settings, rows[::-1])
    assert (tmp_path / "out" / "results.json").read_bytes() == first
    held = json.loads(first)
    assert len(held["rows"]) == len(rows)
    assert held["settings"]["labelled"] == SETTINGS.labelled
    assert {"python", "torch", "lara_adapter"} <= held["environment"].keys()
    results.add_rows(settings, [{**rows[0], "r2": 0.25}])
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(held["rows"]) == len(rows)
    assert [row["r2"] for row in held["rows"] if (row["arm"], row["measure"]) == ("plain", "probe")] == [0.25]
    # more seeds may come, other settings may not
    results.check(dataclasses.replace(settings, seeds=(7,), workers=1))
    with pytest.raises(results.ResultsUnusable, match="lam_steps"):
        results.add_rows(dataclasses.replace(settings, lam_steps=99), rows)


def test_the_table_says_what_the_rows_say(tmp_path):
    settings = dataclasses.replace(SETTINGS, output=tmp_path)
    results.add_rows(settings, make_rows(("distractors", "clean")))
    text = report.write(tmp_path)
    assert (tmp_path / "refine_lam.png").stat().st_size > 10_000
    table = report.table(make_rows())
    assert [row[0] for row in table[1:]] == [*results.LAMS.values(), *results.REFERENCES.values()]
    contrastive = dict(zip(table[0], table[4]))
    low, high = interval_of_mean([0.8, 0.81, 0.82])
    assert contrastive["probe R2"] == f"0.81 ({low:.2f} to {high:.2f})"
    wilson = [round(100 * end) for end in wilson_interval(18, 24)]
    assert contrastive["Moto-GPT success"] == f"75 % ({wilson[0]}-{wilson[1]})"
    assert contrastive["codes"] == "101"
    differences = report.differences(make_rows())
    line = dict(zip(differences[0], differences[3]))
    assert line["Moto-GPT error"] == "-0.020 (-0.020 to -0.020)"
    assert contrastive["Moto-GPT error"] == "0.170 (0.170 to 0.170)"
    assert line["probe R2"] == "+0.20 (+0.20 to +0.20)"
    assert line["Moto-GPT success"].startswith("+50 (")
    assert line["success on labels"] == "+0 (+0 to +0)"
    for cell in (contrastive["probe R2"], line["Moto-GPT success"], "Without distractors", "3 of the policies"):
        assert cell in text


def test_one_seed_has_no_interval_over_seeds_but_one_over_demonstrations():
    rows = make_rows(seeds=1)
    table, differences = report.table(rows), report.differences(rows)
    assert dict(zip(table[0], table[1]))["probe R2"] == "0.50"
    assert dict(zip(differences[0], differences[1]))["probe R2"] == "-0.10"
    for row in rows:
        if row["measure"] == "probe":
            share = {"plain": 0.5, "control": 0.4, "cosine": 0.3, "contrastive": 0.2}[row["arm"]]
            row |= {"r2": 1 - share, "errors": [share * v for v in (1, 2, 3, 4)], "variances": [1, 2, 3, 4]}
    table, differences = report.table(rows), report.differences(rows)
    # each demonstration says the same, so there is nothing to be unsure of
    assert dict(zip(table[0], table[4]))["probe R2"] == "0.80 (0.80 to 0.80)"
    assert dict(zip(differences[0], differences[3]))["probe R2"] == "+0.20 (+0.20 to +0.20)"
    rows[0]["errors"] = [0.9, 0.4, 1.8, 0.1]
    mean, low, high = rows[0]["r2"], *over_demonstrations(rows, rows[0]["arm"], "probe")
    assert low < 1 - 3.2 / 10 < high
    assert over_demonstrations(make_rows(seeds=2), "plain", "probe") == (None, None)
    assert mean == 0.5


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(results.ResultsUnusable, match="is missing: run"):
        report.write(tmp_path)
