"""LeRobot's own code on a recording of examples/libero: its loader, and the loop's training and serving."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-lerobot")

from helpers.libero_episodes import toy_episode, toy_recording
from lara_adapter.integrations.served import open_served

from examples.libero.dataset import FPS, VIEWS
from examples.libero.train import lerobot_command
from lara_adapter import LatentActionConfig, LatentActionModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("actions", [True, False])
def test_lerobots_own_loader_reads_it(tmp_path, actions):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = toy_recording(tmp_path / "data", actions=actions)
    gap = {VIEWS["image"]: [0, 5 / FPS]} | ({"action": [i / FPS for i in range(4)]} if actions else {})
    dataset = LeRobotDataset("local/libero", root=root, delta_timestamps=gap, return_uint8=True)
    assert (len(dataset), dataset.num_episodes) == (41, 3)
    item = dataset[14]  # frame 2 of the second episode
    expected = toy_episode(20, actions=actions)
    assert item["task"] == "take the box"
    assert dataset[40]["task"] == "take the can"
    assert np.allclose(item["observation.state"], expected.states[2])
    shown = item[VIEWS["image"]].float().mean((1, 2, 3)).numpy()
    assert np.allclose(shown, expected.views["image"][[2, 7]].mean((1, 2, 3)), atol=4)
    if actions:
        assert np.allclose(item["action"], expected.actions[2:6])
    assert dataset.meta.stats["observation.state"]["q01"].shape == (8,)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_loops_policies_train_with_lara_and_without_and_are_served(tmp_path):
    root = toy_recording(tmp_path / "data", lengths={"take the box": (40, 44), "take the can": (42,)})
    lam = tmp_path / "lam"
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(lam)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for arm in ("dit_only", "lara_contrastive"):
        output = tmp_path / arm
        command = lerobot_command(arm, root, lam, output, steps=3, batch=4, lr=1e-4, seed=0)
        done = subprocess.run(
            [sys.executable, *command, "--workers", "0"], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        served = open_served(str(output / "policy"), device="cpu")
        config = served.get_modality_config()
        assert (config["video"].modality_keys, config["state"].modality_keys) == (["image", "image2"], ["state"])
        episode = toy_episode(2)
        views = {"image": episode.views["image"], "image2": episode.views["wrist_image"]}
        observation = {
            "video": {name: frames[:1, None] for name, frames in views.items()},
            "state": {"state": episode.states[:1, None]},
            "language": {"task": [["take the box"]]},
        }
        action, _ = served.get_action(observation)
        assert action["action"].shape[0] == 1
        assert action["action"].shape[-1] == 7
        assert np.isfinite(action["action"]).all()
        assert (output / "lara").is_dir() == (arm == "lara_contrastive")
