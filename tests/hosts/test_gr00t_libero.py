"""GR00T's own loader on a recording of examples/libero."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("gr00t", reason="Isaac GR00T is not installed; LARA_GR00T_SRC names a checkout")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: make test-gr00t")

from helpers.libero_episodes import toy_episode, toy_recording


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
