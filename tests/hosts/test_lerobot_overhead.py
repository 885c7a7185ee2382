"""The policies of step_overhead.py: full width is what LeRobot's own defaults are; a row is recorded whole."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")

from benchmarks.speed import overhead_hosts, step_overhead
from benchmarks.speed.overhead_hosts import FULL


def default_config(name: str):
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.xvla.configuration_xvla import XVLAConfig

    return {"smolvla": SmolVLAConfig, "multi_task_dit": MultiTaskDiTConfig, "xvla": XVLAConfig}[name]()


@pytest.mark.parametrize("name", FULL)
def test_full_width_is_lerobots_default(name):
    config, full = default_config(name), FULL[name]
    differing = {key: value for key, value in full.settings.items() if getattr(config, key) != value}
    assert not differing
    assert full.horizon == (config.horizon if name == "multi_task_dit" else config.chunk_size)
    assert (full.observations or 1) == config.n_obs_steps


@pytest.mark.long
def test_a_row_has_every_way_and_its_memory(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    asked = ["--host", "lerobot:multi_task_dit", "--batch", "2", "--rounds", "2", "--steps", "1", "--warmup", "1"]
    monkeypatch.setattr(sys, "argv", ["step_overhead.py", *asked, "--memory", "--out", str(out)])
    assert step_overhead.main() == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["ratio"]) == {"alone", "idle", "tap", "projector", "frozen", "joint", "joint/4", "detached"}
    assert row["ratio"]["alone"] == 1.0
    assert row["ratio"]["joint"] > row["ratio"]["frozen"] > 1.0
    assert set(row["peak_mb"]) == {"alone", "frozen", "joint", "joint/4"}
    assert "lerobot:multi_task_dit (0.10 M)" in capsys.readouterr().out


def test_an_unknown_host_is_refused():
    with pytest.raises(ValueError, match="expected demo, gr00t, gr00t-head"):
        overhead_hosts.build("lerobot-full:groot")
