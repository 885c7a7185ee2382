"""The recorded refinement of a LAM: well-formed, paired, and what the README of the LAM says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "refine_lam"
README = ROOT / "lara_adapter" / "lam" / "README.md"
LAMS = {"plain", "control", "cosine", "contrastive"}

pytest.importorskip("tyro")  # the report of the example imports its settings


@pytest.fixture(scope="module")
def results():
    return json.loads((FOLDER / "results.json").read_text())


@pytest.fixture(scope="module")
def section():
    found = re.search(r"<!-- refine: begin -->\n(.*?)<!-- refine: end -->", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_it_says_what_was_run(results):
    assert {"python", "torch", "metaworld", "mujoco", "lara_adapter"} <= results["environment"].keys()
    assert results["settings"]["tasks"] == ["button-press-topdown", "drawer-open"]
    assert not re.search(r'[" ]/\w+/', (FOLDER / "results.json").read_text()), "a path of somebody's machine"
    assert (FOLDER / "refine_lam.png").read_bytes()[:4] == b"\x89PNG"


def test_every_row_is_there_once_and_every_arm_has_it(results):
    rows = results["rows"]
    keys = [(row["world"], row["seed"], row["arm"], row["measure"]) for row in rows]
    assert len(keys) == len(set(keys))
    for world, seed, measure in {(world, seed, measure) for world, seed, _, measure in keys}:
        arms = {row["arm"] for row in rows if (row["world"], row["seed"], row["measure"]) == (world, seed, measure)}
        assert arms & LAMS == LAMS, (world, seed, measure)


def test_numbers_are_possible_and_episodes_are_paired(results):
    settings = results["settings"]
    for row in results["rows"]:
        if "r2" in row:
            assert row["interval"][0] <= row["r2"] <= row["interval"][1] <= 1
            assert row["r2"] == pytest.approx(1 - sum(row["errors"]) / sum(row["variances"]))
        if "solved" in row:
            assert row["solved"].keys() == set(settings["tasks"])
            everything = [value for task in row["solved"].values() for value in task]
            assert len(everything) == len(settings["tasks"]) * settings["episodes"]
            assert set(everything) <= {0, 1}
            assert row["success"] == pytest.approx(sum(everything) / len(everything))
        if row["measure"] == "information":
            assert row["corrected"] == pytest.approx(row["plug_in"] - row["permuted"])
            assert row["held_out"] <= row["entropy"] <= 3


def test_the_section_holds_the_tables_of_the_results(results, section):
    from examples.refine_lam import report as refine_report

    for table in refine_report.as_markdown(results).split("\n\n"):
        assert table in section


def test_every_number_of_the_prose_is_one_of_the_tables(results, section):
    from examples.refine_lam import report as refine_report

    tables = refine_report.as_markdown(results)
    prose = section
    for table in tables.split("\n\n"):
        prose = prose.replace(table, "")
    known = set(re.findall(r"\d+\.\d+", tables))
    quoted = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)", prose)
    assert quoted
    for number in quoted:
        assert number in known, number
    shares = re.findall(r"(\d+) %", prose)
    assert {share for share in shares if share != "95"} <= set(re.findall(r"(\d+) %", tables))


def test_the_section_shows_its_picture_and_its_command(section):
    (picture,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", section)
    assert (README.parent / picture).resolve() == (FOLDER / "refine_lam.png").resolve()
    assert "python examples/refine_lam.py --report benchmarks/results/refine_lam" in section
