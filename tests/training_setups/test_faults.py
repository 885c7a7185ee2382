"""Killed during a save, a full disk: nothing half-written is ever loaded, the last good state stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.toys import DitPolicy

from lara_adapter import load_lara

HERE = Path(__file__).parent

SAVER = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from helpers.models import build
policy, lara = build(lam="tiny")
step = 0
print("ready", flush=True)
while True:
    lara.step = step
    lara.save_pretrained({folder!r})
    step += 1
"""


def start(folder, **environment):
    code = SAVER.format(paths=[str(HERE), str(HERE.parent), str(HERE.parents[1])], folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout.readline().strip() == "ready"
    return process


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save_there_is_always_a_whole_adapter(tmp_path):
    """A process that saves over and over is killed at 8 random-ish moments; what it leaves loads, or is named."""
    folder = tmp_path / "adapter"
    for attempt in range(8):
        process = start(folder)
        deadline = time.monotonic() + 20
        while not (folder / "lara_config.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            lara = load_lara(DitPolicy(), folder)
            assert lara.step >= 0
        else:  # killed between two renames: the previous one stands beside, whole, and an error would name it
            old = max(tmp_path.glob(".adapter.old-*"), key=lambda path: path.stat().st_mtime)
            assert load_lara(DitPolicy(), old).step >= 0
            old.rename(folder)


def test_a_full_disk_is_an_error_and_the_last_adapter_stays(tmp_path):
    """A file size limit stands for the full disk: the kernel refuses the write in the middle of a file."""
    folder = tmp_path / "adapter"
    code = SAVER.format(paths=[str(HERE), str(HERE.parent), str(HERE.parents[1])], folder=str(folder))
    code = (
        code.split("step = 0")[0]
        + f"""
import resource, signal
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
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout or "I/O error" in done.stdout, done.stdout + done.stderr
    assert load_lara(DitPolicy(), folder).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


TRAINER = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_trainer import build, trainer_of
from lara_adapter.integrations.trainer import LaraCallback
policy, lara = build()
trainer = trainer_of(policy, {folder!r}, save_strategy="steps", save_steps=1, max_steps=10000, save_total_limit=3)
LaraCallback.add_to(trainer, lara)
print("ready", flush=True)
trainer.train()
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint_every_adapter_in_it_is_whole_or_absent(tmp_path):
    """transformers writes its own files in place; the adapter beside them appears as a whole or not at all."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    whole = 0
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        code = TRAINER.format(paths=[str(HERE), str(HERE.parent), str(HERE.parents[1])], folder=str(folder))
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, "the training process died"
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoint-*/lara")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.31 * attempt)
        process.kill()
        process.wait()
        for saved in folder.glob("checkpoint-*/lara"):
            step = int(saved.parent.name.split("-")[1])
            assert load_lara(DitPolicy(), saved).step == step
            whole += 1
    assert whole >= 3
