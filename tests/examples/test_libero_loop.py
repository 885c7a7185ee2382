"""The parts of LIBERO's loop that need no simulator: tables, training, serving, report, commands."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra video)")
pytest.importorskip("zmq", reason="pyzmq is not installed (extra serve)")

from helpers.libero_episodes import toy_episode, toy_recording

from examples.demo.data import batches, load_table
from examples.libero import commands, report
from examples.libero.dataset import VIEWS
from examples.libero.served import VARIABLE, ServedLiberoPolicy, policy
from examples.libero.tables import instructions, make_tables, shrink
from examples.libero.train import ARMS, lerobot_command, table_jobs, train
from lara_adapter import LaraError, LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import write_json

LENGTHS = {"take the box": (40, 44), "take the can": (42, 37)}


def nothing(count: int) -> None:
    """No progress is shown."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return toy_recording(tmp_path_factory.mktemp("libero") / "data", lengths=LENGTHS)


@pytest.fixture(scope="module")
def tables(root, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tables")
    for task in LENGTHS:
        (folder / task).mkdir()
        make_tables(folder / task, nothing, root=root, task=task, splits={"demos": [0, 1], "heldout": [1, 2]})
    return [folder / task for task in LENGTHS]


def test_shrinking_is_the_mean_of_squares():
    frame = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), np.uint8)
    small = shrink(frame)
    assert (small.shape, small.dtype) == ((1, 3, 64, 64), torch.uint8)
    assert abs(int(small[0, 1, 5, 7]) - frame[0, 10:12, 14:16, 1].mean()) <= 0.51


def test_tables_have_both_views_the_right_chunks_and_one_task_each(tables):
    table = load_table(tables, "demos", distractors=False, seed=0)
    assert table["image"].shape == table["wrist_image"].shape == (41, 3, 64, 64)  # every second of 40 and 42 frames
    assert table["task"].tolist() == [0] * 20 + [1] * 21
    first = toy_episode(40)
    assert np.allclose(table["action"][3], first.actions[6:22])
    assert np.allclose(table["state"][3], first.states[6])
    bright = first.views["wrist_image"].mean((1, 2, 3))
    assert np.allclose(table["wrist_image"][:20].float().mean((1, 2, 3)), bright[::2], atol=4)
    rows = next(batches(table, 8, 1, 0))
    assert {"image", "wrist_image", "lara_frames"} <= rows.keys()
    assert rows["lara_frames"].shape == (8, 2, 3, 64, 64)


def test_play_without_actions_has_none_that_could_be_used(tmp_path):
    root = toy_recording(tmp_path / "data", actions=False, lengths={"play": (40,)})
    make_tables(tmp_path, nothing, root=root, task="play", splits={"play": [0, 1]})
    assert torch.load(tmp_path / "play.pt")["action"][:10].isnan().all()


def test_too_few_episodes_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="2 episodes of take the box, but 3 are expected"):
        make_tables(tmp_path, nothing, root=root, task="take the box", splits={"demos": [0, 3]})


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_trains_and_its_policy_is_served(root, tables, tmp_path, monkeypatch, arm):
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(tmp_path / "lam")
    folder = tmp_path / "policy"
    folder.mkdir()
    train(
        folder, nothing, instructions=instructions(root), data=tables, steps=2, batch=4, lr=1e-4, execute=8, seed=0,
        lam=None if ARMS[arm] is None else tmp_path / "lam", lara_options=ARMS[arm], config={"width": 32, "depth": 3},
    )  # fmt: skip
    assert (folder / "adapter").is_dir() == (ARMS[arm] is not None)
    monkeypatch.setenv(VARIABLE, str(folder))
    served = policy()
    assert served.get_modality_config()["video"].modality_keys == list(VIEWS)
    episode = toy_episode(2, size=128)
    observation = {
        "video": {view: np.stack([frames[:1]] * 2) for view, frames in episode.views.items()},
        "state": {"state": np.stack([episode.states[:1]] * 2)},
        "language": {"task": [["take the can"], ["take the box"]]},
    }
    one, again, other = (served.get_action(observation, {"seed": seed})["action"] for seed in (1, 1, 2))
    assert one.shape == (2, 16, 7)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match="knows the tasks"):
        served.get_action({**observation, "language": {"task": [["take the cup"]] * 2}})


def test_a_policy_needs_its_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=VARIABLE):
        policy()
    with pytest.raises(LaraError, match=r"policy\.json is missing"):
        ServedLiberoPolicy.load(tmp_path)


def test_a_job_for_each_task(root):
    jobs = table_jobs(root, list(LENGTHS), {"demos": [0, 2]})
    assert [job.settings["task"] for job in jobs] == list(LENGTHS)
    assert [job.units for job in jobs] == [4, 4]


def test_the_command_of_lerobot_resumes_what_there_is(tmp_path):
    words = lerobot_command("lara_contrastive", tmp_path, tmp_path / "lam", tmp_path, steps=8, batch=2, lr=1e-4, seed=3)
    text = " ".join(words)
    assert "--alignment contrastive" in text
    assert "--views observation.images.image" in text
    assert words[-1] == "--resume"
    plain = lerobot_command("dit_only", tmp_path, tmp_path / "lam", tmp_path / "new", steps=8, batch=2, lr=1e-4, seed=3)
    assert "--no-lara" in plain
    assert "--lam" not in plain
    assert "--resume" not in plain


def test_a_report_and_a_row_of_pictures_for_each_arm(tmp_path):
    from PIL import Image

    from examples.libero.dataset import write_video

    folders = {arm: tmp_path / arm for arm in ("dit_only", "lara_cosine")}
    for solved, folder in enumerate(folders.values()):
        row = {"successes": solved, "episodes": 2, "interval_95": [0.1, 0.9]}
        write_json(folder / "report.json", {"tasks": {"pick_it": row}, "all": row})
        (folder / "videos").mkdir()
        write_video(folder / "videos/pick_it-0.mp4", toy_episode(12, size=64).views["image"])
    text = report.write(tmp_path / "report.md", folders)
    assert "1 / 2 (0.10 to 0.90)" in text
    assert "| pick it | 0 / 2 | 1 / 2 |" in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (64 * report.PICTURES, 128)


def test_a_command_that_fails_or_is_missing_says_so(tmp_path):
    with pytest.raises(commands.CommandFailed, match="exit status 3"):
        commands.run(Path(sys.executable), "-c", "raise SystemExit(3)")
    with pytest.raises(commands.CommandFailed, match="make lerobot-env"):
        commands.run(tmp_path / "python")
    server = commands.Server(Path(sys.executable), "no.such.module:policy", {})
    with pytest.raises(commands.CommandFailed, match="did not start"), commands.served(server):
        pass
