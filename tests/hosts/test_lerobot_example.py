"""examples/record_metaworld.py and lerobot_posttrain.py, whole: a real dataset, a real policy, a real simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-lerobot")
pytest.importorskip("metaworld", reason="Meta-World is not installed: make test-lerobot")
pytest.importorskip("tyro", reason="tyro is not installed: make test-lerobot")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gl, pytest.mark.slow, pytest.mark.timeout(600)]

# stock LeRobot alone: an import of lara_adapter would raise
STOCK = """
import sys
sys.modules["lara_adapter"] = None
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
folder = sys.argv[1]
config = PreTrainedConfig.from_pretrained(folder)
policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True).eval()
before, after = make_pre_post_processors(config, pretrained_path=folder)
observation = {"observation.images.front": torch.rand(1, 3, 64, 64), "observation.state": torch.zeros(1, 4)}
action = after(policy.select_action(before({**observation, "task": ["handle press"]})))
assert action.shape == (1, 4) and action.isfinite().all()
print(config.type)
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def posttrain(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "examples" / "lerobot_posttrain.py", *arguments)


@pytest.fixture(scope="module")
def smoke(gl, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a smoke run, and what it printed."""
    output = tmp_path_factory.mktemp("posttrain") / "run"
    done = posttrain("--smoke", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return output, done.stdout


def test_smoke_goes_the_whole_path(smoke):
    output, printed = smoke
    assert "resumed from step 4: the weights are bit-identical" in printed
    report = json.loads((output / "report.json").read_text())
    assert report["training"]["policy"] == "multi_task_dit"
    assert report["closed_loop"]["all"]["episodes"] == 2
    last = report["training"]["history"][-1]
    assert last["step"] == 8
    assert last["align_loss"] > 0
    assert last["lam_loss"] > 0
    assert (output / "rollout.mp4").stat().st_size > 1000
    assert (output / "rollout.png").read_bytes()[1:4] == b"PNG"
    assert (output / "lara" / "lara_config.json").is_file()


def test_the_recording_is_a_lerobot_dataset_with_video(smoke):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = smoke[0] / "data"
    info = json.loads((root / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["features"]["observation.images.front"]["dtype"] == "video"
    dataset = LeRobotDataset("local/metaworld", root=root, video_backend="pyav")
    assert dataset.num_episodes == 3
    assert dataset[0]["task"] == "handle press"
    moved = (dataset[0]["observation.images.front"] - dataset[len(dataset) - 1]["observation.images.front"]).abs()
    assert moved.max() > 0.2, "the arm does not move"


def test_the_export_is_stock_lerobot(smoke):
    done = run("-c", STOCK, smoke[0] / "policy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "multi_task_dit"


def test_the_baseline_starts_from_the_same_weights_batch_and_noise(smoke, tmp_path):
    # as in the smoke run, so that the shuffled order is too
    same = ["--tiny", "--steps", "8", "--batch", "8", "--workers", "0", "--episodes", "0"]
    done = posttrain("--root", smoke[0] / "data", "--output", tmp_path / "run", "--no-lara", *same)
    assert done.returncode == 0, done.stdout + done.stderr
    first, with_lara = (
        json.loads((output / "report.json").read_text())["training"]["history"][0]
        for output in (tmp_path / "run", smoke[0])
    )
    assert first["action_loss"] == pytest.approx(with_lara["action_loss"], rel=1e-6)
    assert "align_loss" not in first
    assert not (tmp_path / "run" / "lara").exists()


def test_post_trains_a_saved_policy(smoke, tmp_path):
    given = ["--policy-path", smoke[0] / "policy", "--lam", smoke[0] / "lam", "--alignment", "contrastive"]
    short = ["--steps", "1", "--batch", "4", "--workers", "0", "--episodes", "0"]
    done = posttrain("--root", smoke[0] / "data", "--output", tmp_path / "run", *given, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "lam").exists(), "a LAM was trained although one was given"


@pytest.mark.long
def test_nothing_is_overwritten(smoke, tmp_path):
    (tmp_path / "policy").mkdir()  # of a run that was none of --smoke
    for done in (
        posttrain("--smoke", "--output", tmp_path),
        run(ROOT / "examples" / "record_metaworld.py", "--root", smoke[0] / "data"),
        posttrain("--root", smoke[0] / "data", "--output", smoke[0], "--episodes", "0"),
    ):
        assert done.returncode == 2
        assert "exists" in done.stderr
        assert "Traceback" not in done.stderr
    assert (tmp_path / "policy").is_dir()


def test_a_folder_without_a_dataset_is_one_line(tmp_path):
    done = posttrain("--root", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected the folder of a LeRobot dataset" in done.stderr
