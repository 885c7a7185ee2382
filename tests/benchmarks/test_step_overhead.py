"""A row after every round, the operations of a step, and what stands in for a VLM."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.speed import step_overhead
from benchmarks.speed.counts import count
from benchmarks.speed.overhead_hosts import Products


def test_the_products_cost_what_they_are_asked_to():
    vlm = Products(gflop=0.01, tokens=4, width=32)
    counts, _ = count(lambda: vlm(torch.zeros(3, 7)))
    assert counts.flop / 3e9 == pytest.approx(0.01, rel=0.02)
    assert not any(parameter.requires_grad for parameter in vlm.parameters())


def test_a_run_leaves_a_row_after_every_round_with_the_operations_of_a_step(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    written = []
    record = step_overhead.record
    monkeypatch.setattr(step_overhead, "record", lambda row, path: (written.append(row["rounds"]), record(row, path)))
    asked = "--host demo --batch 2 --rounds 2 --steps 1 --warmup 0 --ways tap joint joint/4 detached --device cpu"
    monkeypatch.setattr(sys, "argv", ["step_overhead", *asked.split(), "--out", str(out)])
    assert step_overhead.main() == 0
    assert written == [1, 2]
    (row,) = json.loads(out.read_text())["rows"]
    work = row["gflop"]
    assert work["alone"] == work["tap"] == work["detached"] < work["joint/4"] < work["joint"]
    assert row["ratio"].keys() == work.keys()
    assert "joint/4" in capsys.readouterr().out
