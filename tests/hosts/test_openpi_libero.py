"""openpi's own data pipeline on a recording of examples/libero, with LARA's frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("openpi", reason="openpi is not installed: make test-openpi")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-openpi")

from helpers import openpi_disk
from helpers.libero_episodes import toy_episode, toy_recording
from lara_adapter.integrations.openpi import FramePlan, create_data_loader
from openpi.policies import libero_policy
from openpi.training import config as configs
from openpi.transforms import Group, RepackTransform

from examples import openpi_tiny

C = 5
# openpi's name of an input -> the recording's
NAMES = {
    "observation/image": "observation.images.image", "observation/wrist_image": "observation.images.image2",
    "observation/state": "observation.state", "actions": "action", "prompt": "prompt",
}  # fmt: skip


def test_openpis_pipeline_reads_it_and_gives_the_pair(monkeypatch):
    folder = openpi_disk.written()
    from lerobot.constants import HF_LEROBOT_HOME

    if not (HF_LEROBOT_HOME / "local/libero").is_dir():
        toy_recording(HF_LEROBOT_HOME / "local/libero", "v2.1")
    config = openpi_tiny.train_config(folder)
    data = configs.SimpleDataConfig(
        repo_id="local/libero",
        assets=config.data.assets,
        data_transforms=lambda model: Group(
            inputs=[libero_policy.LiberoInputs(model_type=model.model_type)], outputs=[libero_policy.LiberoOutputs()]
        ),
        base_config=configs.DataConfig(
            prompt_from_task=True, action_sequence_keys=("action",),
            repack_transforms=Group(inputs=[RepackTransform(NAMES)]),
        ),
    )  # fmt: skip
    loader = create_data_loader(dataclasses.replace(config, data=data), FramePlan(gap=C, frame_size=32), shuffle=False)
    seen, actions = next(iter(loader))
    assert actions.shape[0] == 4
    expected = toy_episode(12)
    frames = seen.lara_frames.float().mean((2, 3, 4)).numpy()
    wanted = expected.views["image"].mean((1, 2, 3))
    assert np.allclose(frames[:4], np.stack([wanted[:4], wanted[C : C + 4]], 1), atol=4)
    assert seen.lara_frames_valid.all()
