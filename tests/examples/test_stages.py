from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import stage_jobs

from examples.demo.stages import Job, StageFailed, run_jobs

ROOT = Path(__file__).resolve().parents[2]


def make_job(name: str, log: Path, **settings) -> Job:
    return Job(name, stage_jobs.write, {"log": str(log), "text": name, **settings}, units=2)


def test_results_are_kept_and_only_what_is_missing_runs(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    jobs = [make_job("a", log), make_job("b", log)]
    folders = run_jobs("first", jobs, cache, workers=2)
    assert [(folder / "result").read_text() for folder in folders] == ["a", "b"]
    assert sorted(log.read_text().split()) == ["a", "b"]
    assert jobs[0].timing(cache).keys() == {"seconds", "cpu_seconds"}
    # once more, with one more job: only that one runs
    again = run_jobs("second", [*jobs, make_job("c", log)], cache, workers=2)
    assert again[:2] == folders
    assert sorted(log.read_text().split()) == ["a", "b", "c"]
    # another setting is another result; the old one stays
    run_jobs("third", [make_job("a", log, extra=1)], cache, workers=1)
    assert sorted(log.read_text().split()) == ["a", "a", "b", "c"]
    assert (folders[0] / "result").read_text() == "a"


def test_a_changed_input_renames_what_depends_on_it_and_a_moved_output_does_not(tmp_path):
    def chain(cache: Path, seed: int) -> Path:
        first = Job("first", stage_jobs.write, {"seed": seed}, 1).folder(cache)
        return Job("second", stage_jobs.write, {"data": [first / "part"]}, 1).folder(cache)

    assert chain(tmp_path / "x", 0).name == chain(tmp_path / "y", 0).name
    assert chain(tmp_path / "x", 0).name != chain(tmp_path / "x", 1).name


def test_a_failure_is_told_and_keeps_what_was_finished(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    jobs = [make_job("good", log), Job("bad", stage_jobs.fail, {}, 1)]
    with pytest.raises(StageFailed, match="this job always fails"):
        run_jobs("failing", jobs, cache, workers=1)
    assert jobs[0].folder(cache).is_dir()
    assert not jobs[1].folder(cache).exists()
    assert [path.name for path in cache.iterdir()] == [jobs[0].folder(cache).name]  # nothing half-written


def test_a_killed_process_is_noticed(tmp_path):
    with pytest.raises(StageFailed, match="died without an error message"):
        run_jobs("dying", [Job("dead", stage_jobs.die, {}, 1)], tmp_path / "cache", workers=1)


def test_a_killed_run_goes_on_where_it_stopped_and_leaves_no_process(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from helpers import stage_jobs
            from examples.demo.stages import Job, run_jobs
            if __name__ == "__main__":
                cache, log = Path({str(tmp_path / "cache")!r}), {str(tmp_path / "log")!r}
                run_jobs("one", [Job("one", stage_jobs.write, dict(log=log, text="one"), 2)], cache, 1)
                slow = dict(log=log, text="two", pid=str(cache.parent / "pid"), wait=float(sys.argv[1]))
                run_jobs("two", [Job("two", stage_jobs.write, slow, 2)], cache, 1)
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.Popen([sys.executable, script, "600"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = int((tmp_path / "pid").read_text())
    run.kill()
    run.wait()
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    if Path("/proc").is_dir():
        assert not Path(f"/proc/{worker}").exists()
    assert run.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, script, "0"], env=environment, check=True, stderr=subprocess.DEVNULL, timeout=60)
    assert (tmp_path / "log").read_text().split() == ["one", "two"]
