"""`lara serve` and `lara eval`, whole: two processes, a socket, and Meta-World."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("metaworld", reason="Meta-World is not installed (extra demo)")
pytest.importorskip("tyro")
pytest.importorskip("zmq")
pytest.importorskip("msgpack")

from helpers.serving_policies import ROOT

pytestmark = [pytest.mark.gl, pytest.mark.slow]
POLICIES = ROOT / "examples" / "served_policies.py"


@pytest.fixture(scope="module", autouse=True)
def _gl(gl):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUJOCO_GL", gl)
        yield


def lara(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lara_adapter.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def served(function: str):
    """`lara serve` in a process; yields its port."""
    child = subprocess.Popen(
        lara("serve", f"{POLICIES}:{function}", "--port", "0"), stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        line = child.stdout.readline()
        assert line.startswith("serving "), line
        yield int(line.rpartition(":")[2])
        child.terminate()
        assert child.wait(20) == 0, "SIGTERM does not end it well"
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def evaluate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        lara("eval", *arguments), capture_output=True, text=True, timeout=200, env=environment(), check=False
    )


@pytest.mark.long
def test_the_scripted_expert_succeeds_through_the_socket_and_a_second_call_resumes(tmp_path):
    pytest.importorskip("av")
    output, tasks = tmp_path / "run", ("handle-press", "drawer-close")
    with served("expert") as port:
        common = (*tasks, "--output", output, "--port", str(port))
        first = evaluate(*common, "--episodes", "1", "--seed", "3", "--videos", "1")
        assert first.returncode == 0, first.stderr
        report = json.loads((output / "report.json").read_text())
        for task in tasks:
            row = report["tasks"][task]
            assert (row["successes"], row["episodes"], row["runs"][0]["seed"]) == (1, 1, 3)
            assert 5 < row["runs"][0]["steps"] < 150
            assert row["runs"][0]["requests"] == row["runs"][0]["steps"]
            assert row["interval_95"] == pytest.approx([0.2065, 1.0], abs=1e-3)
            _check_video(output / "videos" / f"{task}-3.mp4", row["runs"][0]["steps"])
        assert report["all"]["successes"] == 2
        assert report["settings"]["sampling_seed"] == "the server's own"
        assert "handle-press" in first.stdout
        assert "1/1" in first.stdout

        files = {path: path.stat().st_mtime_ns for path in (output / "episodes").iterdir()}
        # one more episode of one task: only that is run
        second = evaluate(*common[1:], "--episodes", "2", "--seed", "3", "--json")
        assert second.returncode == 0, second.stderr
        assert json.loads(second.stdout)["all"]["episodes"] == 2
        assert {path: path.stat().st_mtime_ns for path in files} == files
        assert len(list((output / "episodes").iterdir())) == 3


def _check_video(path: Path, steps: int) -> None:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert frames[0].shape == (256, 256, 3)
    assert len(frames) in (-(-steps // 4), -(-steps // 4) + 1)
    assert abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 60, "nothing moves"


def test_mini_vla_acts_from_the_camera_with_a_temporal_ensemble(tmp_path):
    with served("untrained") as port:
        flags = f"--episodes 2 --max-steps 12 --execute 4 --ensemble 0.01 --port {port} --json"
        done = evaluate("drawer-open", *flags.split(), "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    runs = report["tasks"]["drawer-open"]["runs"]
    assert [(run["seed"], run["steps"], run["requests"], run["success"]) for run in runs] == [
        (0, 12, 3, False), (1, 12, 3, False),
    ]  # fmt: skip
    assert report["settings"]["sampling_seed"] == "sent with every request"
    assert (report["settings"]["execute"], report["settings"]["ensemble"]) == (4, 0.01)
    assert report["settings"]["simulator_settings"] == {"image_size": 64, "split": 10_000}


def test_a_closed_environment_gives_its_memory_back():
    """`lara eval all` opens fifty tasks in one process; a task's renderers hold some 290 MB."""
    pytest.importorskip("psutil")
    program = """
import gc, psutil
from lara_adapter.integrations.simulators import open_simulator
world, pictures, memory = open_simulator("metaworld"), [], []
for _ in range(3):
    environment = world.open("drawer-open")
    environment.reset(3)
    pictures.append(environment.picture().tobytes() + environment.observe().views["front"].tobytes())
    environment.close()
    del environment
    gc.collect()
    memory.append(psutil.Process().memory_info().rss / 2**20)
assert len(set(pictures)) == 1
print(memory[-1] - memory[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr
    assert float(done.stdout) < 150
