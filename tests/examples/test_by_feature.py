"""Each example of examples/by_feature in its smoke form, and what it prints."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "by_feature"
PRINTS = {
    "own_loop": r"optimizer +holds every LARA parameter[\s\S]*\n3 [\d.]+ -?[\d.]+\n$",
    "hf_trainer": r"'lara/cosine': [\s\S]*adapter: .*checkpoint-4.lara",
    "lightning_module": r"4 training steps with LARA; cosine",
    "accelerate_accumulation": r"8 forwards, 4 updates; alignment",
    "lora": r"policy_lora[\s\S]*MiniVLA acts: \(2, 8, 2\)",
    "custom_policy": r"the last valid token of every sample is aligned: True",
    "several_views": r"over two views; 88% of the pairs count",
    "contrastive": r"'align_loss': .*'perplexity': ",
    "video_without_actions": r"alignment on video [\d.]+\n$",
    "frozen_lam": r"the LAM is unchanged: True",
    "feature_cache": r"(\d+) frames from the cache, \1 encoded",
    "resume": r"goes on at step 2\nthe same weights: True",
    "push_and_act": r"acts the same: True",
}
NEEDS = {
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "accelerate_accumulation": ("accelerate",),
    "lora": ("peft",),
    "feature_cache": ("transformers",),
}


def test_every_example_is_tried_and_on_the_page():
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "world"}
    assert files == set(PRINTS)
    page = (FOLDER.parents[1] / "docs" / "index.md").read_text()
    assert files == set(re.findall(r"^\| `(\w+)\.py` \|", page, re.MULTILINE))


@pytest.mark.parametrize("name", PRINTS)
def test_it_runs(name, tmp_path, capsys):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    example = importlib.import_module(f"examples.by_feature.{name}")
    assert "# New" in (FOLDER / f"{name}.py").read_text()
    example.main(["--steps", "4", "--output", str(tmp_path)])
    assert re.search(PRINTS[name], capsys.readouterr().out)
