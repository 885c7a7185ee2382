"""GR00T's own loader on a recording of examples/libero."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

pytest.importorskip("gr00t", reason="Isaac GR00T is not installed; LARA_GR00T_SRC names a checkout")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: make test-gr00t")

from helpers.libero_episodes import toy_episode, toy_recording

from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.lam.label import label_dataset


def test_gr00ts_own_loader_reads_it(tmp_path):
    from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
    from gr00t.data.dataset.lerobot_episode_loader import LeRobotEpisodeLoader

    config = dict(MODALITY_CONFIGS["libero_panda"])
    loader = LeRobotEpisodeLoader(toy_recording(tmp_path / "data", "v2.1"), config, video_backend="ffmpeg")
    expected = toy_episode(20)
    table = loader[1]
    assert (len(loader), len(table)) == (3, 20)
    assert set(table["language.annotation.human.action.task_description"]) == {"take the box"}
    assert np.allclose(np.stack(table["state.gripper"]), expected.states[:, 6:8])
    assert np.allclose(np.stack(table["action.yaw"]), expected.actions[:, 5:6])
    assert np.allclose(
        np.stack(table["video.wrist_image"]).mean((1, 2, 3)), expected.views["wrist_image"].mean((1, 2, 3)), atol=4
    )
    assert np.shape(loader.get_dataset_statistics()["action"]["x"]["q99"]) == (1,)


def test_video_with_decoded_actions_is_a_dataset_of_gr00ts(tmp_path):
    """`lara label --actions` on a recording without actions; with the demonstrations' modality.json GR00T takes it too."""
    from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
    from gr00t.data.dataset.lerobot_episode_loader import LeRobotEpisodeLoader

    LatentActionModel(LatentActionConfig.tiny(image_size=32, queries=4, latent_dim=8)).save_pretrained(tmp_path / "lam")
    demos = toy_recording(tmp_path / "demos", "v2.1")
    video = toy_recording(tmp_path / "video", "v2.1", actions=False)
    label_dataset(video, tmp_path / "lam", tmp_path / "labelled", gap=4, camera="image", actions=demos, least_r2=-1e9)
    shutil.copy(demos / "meta/modality.json", tmp_path / "labelled/meta/modality.json")
    tables = [
        LeRobotEpisodeLoader(path, dict(MODALITY_CONFIGS["libero_panda"]), video_backend="ffmpeg")[1]
        for path in (demos, tmp_path / "labelled")
    ]
    assert list(tables[0].columns) == list(tables[1].columns)
    known, decoded = (np.stack(table["action.x"]) for table in tables)
    assert decoded.shape == known.shape
    assert known.min() <= decoded.min()
    assert decoded.max() <= known.max()
    assert decoded.std() > 0
