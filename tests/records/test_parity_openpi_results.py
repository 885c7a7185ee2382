"""The recorded comparison with the official release for openpi: well-formed, within tolerance, and what is said of it."""

from __future__ import annotations

import re
import sys

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

NAME = "parity_openpi.json"


@pytest.fixture(scope="module")
def record():
    return read_record(NAME)


@pytest.fixture(scope="module")
def benchmark():
    before = list(sys.path)
    from benchmarks.parity import openpi as parity_openpi

    yield parity_openpi
    sys.path[:] = before


def test_it_says_what_was_compared(record):
    check_environment(record, NAME, {"torch", "rlinf-transformer-openpi", "lpips", "python", "lara_adapter"})
    assert record["environment"]["official"]["folder"] == "LARA_posttrain_openpi"


def test_every_difference_is_within_tolerance(record):
    assert record["tolerance"] == TOLERANCE
    assert record["passes"] is True
    equal = {name: case for name, case in record["cases"].items() if case["switch"]}
    assert {name.partition(",")[0] for name in equal} == {"pi0.5", "pi0"}
    for name, case in equal.items():
        assert not case["kinks"]  # so that all of its rows are judged
        check_case(name, case)
        for dtype in TOLERANCE:
            found = case[dtype]
            compared = sum(row["tensors"] for row in found["gradients"]["total"].values())
            assert compared == found["trainable_tensors"] - len(found["without_gradient"])


def test_all_cases_of_the_benchmark_are_recorded(record, benchmark):
    assert {case.name for case in benchmark.CASES} == record["cases"].keys()
    assert record["settings"] == benchmark.SETTINGS
    assert all(name in benchmark.parity.table(record) for name in record["cases"])


@pytest.mark.parametrize(
    ("document", "heading"),
    [("integrations/openpi/README.md", r"^## \d+\. Parity"), ("README.md", r"^## openpi")],
    ids=["guide", "readme"],
)
def test_the_documents_quote_the_record(record, document, heading):
    """Each number in the section is one of the record's, and each line of the table is its case's."""
    section = re.search(rf"{heading}.*?\n(.*?)(?=^## |\Z)", (ROOT / document).read_text(), re.M | re.S)
    assert section is not None
    check_quoted(record, section[1])
    for name, case in record["cases"].items():
        if case["switch"]:
            assert row_of(name, case) in section[1]


def row_of(name, case):
    """A line of the table: losses in float32, gradients in float32, everything in float64."""
    values = max(row["rel"] for row in case["float32"]["values"].values())
    grads = max(row["rel"] for groups in case["float32"]["gradients"].values() for row in groups.values())
    return f"| {name} | {values:.1e} | {grads:.1e} | {case['float64']['largest_rel']:.1e} |"


def test_without_the_official_code_it_says_so(benchmark, monkeypatch, capsys, tmp_path):
    check_without_the_official_code(
        benchmark, "LARA_posttrain_openpi", "LARA_OFFICIAL_OPENPI_SRC", NAME, monkeypatch, capsys, tmp_path
    )  # fmt: skip
