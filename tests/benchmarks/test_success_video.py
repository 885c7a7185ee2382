"""The tables of benchmarks.success.video, on rows whose truth is known; and its protocol."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from benchmarks.success import video


def row(seed: int, arm: str, solved: int, **more: object) -> dict[str, object]:
    outcomes = {task: "1" * solved + "0" * (50 - solved) for task in ("a", "b")}
    return {"regime": "clean", "seed": seed, "arm": arm, "settings": {}, "solved": outcomes, **more}


def test_differences_are_paired_over_seeds():
    rows = [row(seed, "labelled", 20 + 10 * seed) for seed in range(3)]
    worth = {"r2": 0.8, "r2_still": 0.7, "r2_chunk": 0.6, "r2_ridge": 0.5, "r2_left_out": 0.4}
    rows += [row(seed, "decoded", 25 + 10 * seed, labels=worth) for seed in range(3)]
    rows += [row(9, "decoded", 50, labels=worth)]  # without its pair
    text = video.as_table(rows, "clean")
    assert "| decoded | 77.5 % | +10.0 (+10.0 to +10.0) | +6.7 to +13.7 | 4 | 0.60 | 0.50 | 0.80 | 0.70 |" in text
    assert "| labelled | 60.0 % |  |  | 3 |  |  |  |  |" in text
    assert "decoded" not in video.as_table(rows, "distractors")


def test_the_reading_counts_seeds_that_have_all_arms():
    solved = {"labelled": 20, "decoded": 30, "true": 40}
    worth = {"r2_left_out": 0.6}
    rows = [row(seed, arm, count, labels=worth) for seed in range(2) for arm, count in solved.items()]
    rows.append(row(5, "labelled", 0))
    text = video.reading(rows, "clean")
    assert text == "Clean, 2 seeds: of +40.0 points that true actions add, decoded ones add +20.0, 50% of it."
    assert video.reading(rows, "distractors") == ""
    rows.append(row(1, "supervised", 35))
    assert video.reading(rows, "clean").endswith(" Labels in the LAM's training add +10.0 to that (1 of the seeds).")
    assert video.reading([row(0, arm, 20, labels=worth) for arm in solved], "clean").endswith("nothing to close.")
    solved["decoded"] = 10
    text = video.reading([row(0, arm, count, labels={"r2_left_out": 0.1}) for arm, count in solved.items()], "clean")
    assert "decoded ones add -20.0, none of it. `lara label` refuses such labels" in text


def test_the_protocol():
    """What was fixed before the first run."""
    settings = video.Settings()
    assert (settings.demos, settings.video) == (3, 40)
    assert settings.seeds == tuple(range(16, 24))  # others were looked at
    assert video.FIRST == ("labelled", "true", "decoded")
    assert tuple(video.ARMS) == settings.arms == (*video.FIRST, "supervised", "aligned", "both", "lara")
    assert "seeds" not in settings.same("decoded")
    assert settings.same("supervised").keys() - settings.same("true").keys() == {"supervised_steps", "supervised_lr"}
    assert len(video.recorded()) >= 30  # rows of before still count
