"""What the recorded comparisons with the two official releases have in common: how they are judged and quoted."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def read_record(name):
    return json.loads((RESULTS / name).read_text())


def rows_of(result, with_gradients=True):
    rows = dict(result["values"])
    if with_gradients:
        rows |= {(loss, group): row for loss, groups in result["gradients"].items() for group, row in groups.items()}
    return rows


def check_environment(record, name, packages):
    environment = record["environment"]
    assert re.fullmatch(r"[0-9a-f]{40}", environment["official"]["commit"])
    assert re.fullmatch(r"[0-9a-f]{64}", environment["official"]["sha256"])
    assert packages <= environment.keys()
    assert record["seeds"] >= 3
    assert not re.search(r'[" ]/\w+/', (RESULTS / name).read_text()), "a path of somebody's machine"


def check_case(name, case):
    """Every difference within tolerance, nothing on one side only; rounding at kinks is judged in float64 alone."""
    for dtype, tolerance in TOLERANCE.items():
        found = case[dtype]
        assert found["codes"] > 0
        assert found["codes_that_differ"] == 0
        assert not any(found["left_out"].values())
        assert {"action", "align", "lam", "total"} <= found["values"].keys()
        for key, row in rows_of(found, with_gradients=not (case["kinks"] and dtype == "float32")).items():
            assert math.isfinite(row["abs"]), (name, key)
            assert 0 <= row["rel"] <= tolerance, (name, dtype, key)
        assert found["passes"] is True
        assert found["largest_rel"] == max(row["rel"] for row in rows_of(found).values())
        assert found["gradients"].keys() == {"action", "align", "lam", "total"}


def check_quoted(record, text):
    """Each number like 1.2e-07 in a text is one of the record's."""
    numbers = {f"{tolerance:.0e}" for tolerance in TOLERANCE.values()}

    def collect(value):
        if isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, float):
            numbers.add(f"{value:.1e}")

    collect(record["cases"])
    quoted = re.findall(r"\b\d(?:\.\d)?e-\d\d\b", text)
    assert quoted
    assert not set(quoted) - numbers


def check_without_the_official_code(benchmark, release, variable, name, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    before = (RESULTS / name).read_bytes()
    assert benchmark.main([]) == 2
    assert "git clone" in capsys.readouterr().err
    assert benchmark.main(["--official", str(tmp_path)]) == 2
    assert f"is not a checkout of {release}" in capsys.readouterr().err
    assert (RESULTS / name).read_bytes() == before
