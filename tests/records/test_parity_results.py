"""The recorded comparison with the official release: well-formed, within its tolerances, and what the README says of it."""

from __future__ import annotations

import re

import pytest
from helpers.parity_records import (
    ROOT,
    TOLERANCE,
    check_case,
    check_environment,
    check_quoted,
    check_without_the_official_code,
    read_record,
)

from benchmarks.parity import official as benchmark

NAME = "parity_official.json"


@pytest.fixture(scope="module")
def record():
    return read_record(NAME)


def test_it_says_what_was_compared(record):
    check_environment(record, NAME, {"torch", "transformers", "diffusers", "lpips", "python", "lara_adapter"})
    assert "patch order" in record["settings"]


def test_every_difference_is_within_tolerance(record):
    assert record["tolerance"] == TOLERANCE
    assert record["passes"] is True
    equal = {name: case for name, case in record["cases"].items() if case["switch"]}
    assert len(equal) >= 4
    for name, case in equal.items():
        check_case(name, case)
        for dtype in TOLERANCE:
            rows = case[dtype]["gradients"]["total"].values()
            assert sum(row["tensors"] for row in rows) == case[dtype]["trainable_tensors"]


def test_all_cases_of_the_benchmark_are_recorded(record):
    assert {case.name for case in benchmark.CASES} == record["cases"].keys()
    assert record["settings"] == benchmark.SETTINGS
    assert record["tolerance"] == benchmark.TOLERANCE
    assert all(name in benchmark.table(record) for name in record["cases"])


def test_the_readme_quotes_the_record(record):
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Parity with the official release\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    assert section is not None
    check_quoted(record, section[1])


def test_without_the_official_code_it_says_so(monkeypatch, capsys, tmp_path):
    check_without_the_official_code(
        benchmark, "LARA_full", "LARA_OFFICIAL_SRC", NAME, monkeypatch, capsys, tmp_path
    )  # fmt: skip
