"""The table and the reading of benchmarks.success.training, on rows whose truth is known; and its protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.success import libero_training, training


def row(seed: int, arm: str, share: float, regime: str = "distractors") -> dict[str, object]:
    values = {"pair": 0.2, "still": 0.05, "beyond": 0.4 * share, "ceiling_beyond": 0.4, "share_beyond": share}
    motion = {"displacement": {key: dict.fromkeys(("value", "low", "high"), value) for key, value in values.items()}}
    return {"regime": regime, "seed": seed, "arm": arm, "settings": {}, "motion": motion}


def test_differences_are_paired_over_seeds():
    shares = {"short": 0.25, "long": 0.6, "augmented": 0.7, "labelled": 0.75}
    rows = [row(seed, arm, share + 0.05 * seed) for seed in range(5) for arm, share in shares.items()]
    text = training.table("distractors", rows)
    assert "| long | 5 | 0.20 | 0.05 | 0.28 of 0.40 | 0.70 | +0.35 (+0.35 to +0.35) |" in text
    assert "| short | 5 | 0.20 | 0.05 | 0.14 of 0.40 | 0.35 |  |" in text
    said = training.reading(rows)
    assert "0.70 after the long one (aimed at were 0.6, reached)" in said.replace("\n  ", " ")
    assert "add +0.10 (+0.10 to +0.10): 0.80 (aimed at were 0.6, reached)" in said.replace("\n  ", " ")
    assert "+0.05 (+0.05 to +0.05) to that: 0.85 (aimed at were 0.8, reached)" in said.replace("\n  ", " ")
    low = training.reading([row(0, arm, share) for arm, share in shares.items()])
    assert "(aimed at were 0.8, not reached)" in low.replace("\n  ", " ")
    assert training.reading(rows[:2]) == ""
    assert training.table("clean", rows).count("\n") == 1  # its head


def test_each_regime_has_its_own_aims_and_later_arms_are_read_where_they_have_rows():
    shares = {"short": 0.5, "long": 0.7, "augmented": 0.8, "labelled": 0.9, "vit_short": 0.2, "vit": 0.65}
    rows = [row(seed, arm, share, "clean") for seed in range(5) for arm, share in shares.items()]
    said = training.reading(rows, "clean").replace("\n  ", " ")
    assert said.count("aimed at were 1, not reached") == 4
    assert "(aimed at were 1, not reached), +0.45 (+0.45 to +0.45) to the 0.20 after the short training" in said
    assert training.reading(rows) == ""
    without = [each for each in rows if not str(each["arm"]).startswith("vit")]
    assert "ViT" not in training.reading(without, "clean")


def test_the_protocol():
    """What was fixed before the first row."""
    settings = training.Settings()
    assert settings.seeds == (101, 102, 103, 104, 105)  # 100 was looked at
    assert settings.arms == training.ARMS == ("short", "long", "augmented", "labelled")
    assert settings.pretraining("short") == {"steps": 600, "lr": 5e-4}
    assert settings.pretraining("augmented") == {"steps": 3600, "lr": 1e-3, "augmented": True}
    assert settings.pretraining("labelled") == {"steps": 3600, "lr": 1e-3, "augmented": True, "labelled": 5}
    frozen = {"steps": 3600, "lr": 1e-3, "augmented": True, "encoder": Path("v")}
    assert settings.pretraining("vit", Path("v")) == frozen
    assert "seeds" not in settings.same()


def test_on_libero_the_arms_are_those_that_were_chosen_in_meta_world(tmp_path, monkeypatch):
    settings = libero_training.Settings()
    assert settings.seeds == (0, 1, 2)
    assert settings.same()["arms"]["subtracted"] == training.Settings().pretraining("subtracted")
    monkeypatch.setattr(libero_training, "ROWS", tmp_path / "rows.jsonl")
    assert libero_training.section() == "Not run yet."
    shares = {"short": 0.5, "long": 0.55, "augmented": 0.7, "subtracted": 0.6}
    rows = [row(seed, arm, share, "libero_object") for seed in range(3) for arm, share in shares.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    said = libero_training.section()
    assert "| augmented | 3 | 0.20 | 0.05 | 0.28 of 0.40 | 0.70 | +0.20 (+0.20 to +0.20) |" in said
    assert "reached by augmented and subtracted. By seed: short 0.50, 0.50, 0.50; long" in " ".join(said.split())
