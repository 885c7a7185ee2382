"""Killed during a save, a full disk: nothing half-written is ever loaded, the last good state stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import FixedDit

from lara_adapter import load_lara

PATHS = [str(path) for path in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])]

# Imports torch once; then, for each line it reads, forks a child that runs `job` with that line and may be killed.
FORKS = f"""
import os, sys
sys.path[:0] = {PATHS!r}
import torch
torch.set_num_threads(1)
%s
print("imported", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        job(line.strip())
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""

SAVER = """
from helpers.models import build
def job(folder):
    policy, lara = build(lam="tiny")
    step = 0
    while True:
        lara.step = step
        lara.save_pretrained(folder)
        step += 1
"""

TRAINER = """
from test_trainer import build, trainer_of
from lara_adapter.integrations.trainer import LaraCallback
def job(folder):
    policy, lara = build()
    trainer = trainer_of(policy, folder, save_strategy="steps", save_steps=1, max_steps=10000, save_total_limit=3)
    LaraCallback.add_to(trainer, lara)
    sys.stdout = sys.stderr
    trainer.train()
"""


@contextlib.contextmanager
def forks(job):
    """A function that starts the job on a folder, waits until `ready()`, then for some seconds more, and kills it."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS % job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def kill_after(folder, ready, seconds):
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        while not ready():  # a busy machine takes its time; pytest's own limit ends it
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"

    try:
        assert process.stdout.readline() == "imported\n"
        yield kill_after
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_there_is_always_a_whole_adapter(tmp_path):
    """A process that saves over and over is killed at 8 random-ish moments; what it leaves loads, or is named."""
    folder = tmp_path / "adapter"
    with forks(SAVER) as kill_after:
        for attempt in range(8):
            kill_after(folder, (folder / "lara_config.json").exists, 0.037 * (attempt + 1))
            if folder.exists():
                assert load_lara(FixedDit(), folder).step >= 0
            else:  # killed between two renames: the previous one is beside it, whole, and an error would name it
                old = max(tmp_path.glob(".adapter.old-*"), key=lambda path: path.stat().st_mtime)
                assert load_lara(FixedDit(), old).step >= 0
                old.rename(folder)


def test_a_full_disk_is_an_error_and_the_last_adapter_stays(tmp_path):
    """A file size limit stands for the full disk: the kernel refuses the write in the middle of a file."""
    folder = tmp_path / "adapter"
    code = f"""
import resource, signal, sys
sys.path[:0] = {PATHS!r}
from helpers.models import build
policy, lara = build(lam="tiny")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lara.step = 1
lara.save_pretrained({str(folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
lara.step = 2
try:
    lara.save_pretrained({str(folder)!r})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout or "I/O error" in done.stdout, done.stdout + done.stderr
    assert load_lara(FixedDit(), folder).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint_every_adapter_in_it_is_whole_or_absent(tmp_path):
    """transformers writes its own files in place; the adapter beside them appears as a whole or not at all."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    whole = 0
    with forks(TRAINER) as kill_after:
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            kill_after(folder, lambda folder=folder: any(folder.glob("checkpoint-*/lara")), 0.31 * attempt)
            for saved in folder.glob("checkpoint-*/lara"):
                assert load_lara(FixedDit(), saved).step == int(saved.parent.name.split("-")[1])
                whole += 1
    assert whole >= 3
