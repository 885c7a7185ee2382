"""`lara cache`: what it encoded, training finds; on one process and several, with damaged episodes, after a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from helpers import disk_datasets as disk
from test_encoders import REST, mae
from test_feature_cache import calls
from test_label_shards import launch

from lara_adapter import DatasetError, LaraArgumentError, LatentActionConfig, LatentActionModel, cli
from lara_adapter.data import open_dataset
from lara_adapter.lam.fill_cache import fill_cache
from lara_adapter.lam.image_encoder import describe_image_encoder
from lara_adapter.lam.pixels import resize

FRAMES = sum(disk.LENGTHS)


@pytest.fixture
def lam(tmp_path):
    """The folder of a LAM with a frozen encoder at 32 pixels."""
    torch.manual_seed(0)
    mae(tmp_path / "mae")
    config = LatentActionConfig(**describe_image_encoder(str(tmp_path / "mae")), **REST)
    LatentActionModel(config).save_pretrained(tmp_path / "lam")
    return tmp_path / "lam"


@pytest.fixture
def source(tmp_path):
    return disk.make_v2(tmp_path / "squares", cameras=(disk.CAMERA, disk.WRIST))


def loaded(root, camera, size):
    """All frames of a camera as a data loader gives them, [n, 3, S, S] uint8; `size` None: as recorded."""
    dataset, out = open_dataset(root), []
    for _, frames in dataset.frames(camera, dataset.episodes):
        batch = torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2)
        out.append(batch if size is None else resize(batch, size))
    return torch.cat(out)


def train(lam, folder, frames, dtype=None):
    """How many images the encoder is given when these frames are trained on, and the model's latents."""
    model = LatentActionModel.from_pretrained(lam).train()
    if folder is not None:
        model.cache_features(folder)
    seen, found = calls(model), []
    for start in range(0, len(frames) - 3, 8):
        part = frames[start : start + 8]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found.append(model(part[:-3], part[3:]).latent.continuous.detach())
    return seen, torch.cat(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_finds_every_frame(tmp_path, lam, source, dtype):
    report = fill_cache(source, lam, tmp_path / "cache", dtype=dtype, batch_size=6)
    assert (report.episodes, report.frames, report.left_out) == (3, 2 * FRAMES, {})
    assert report.cameras == [disk.CAMERA, disk.WRIST]
    assert 0 < report.encoded <= report.frames  # still frames look alike
    assert report.gigabytes == pytest.approx(report.encoded * 17 * 32 * (2 if dtype == "bfloat16" else 4) / 1e9)
    narrow = torch.bfloat16 if dtype == "bfloat16" else None
    for camera in report.cameras:
        frames = loaded(source, camera, 32)
        seen, latents = train(lam, tmp_path / "cache", frames, narrow)
        assert seen == []
        _, expected = train(lam, None, frames, narrow)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    other = train(lam, tmp_path / "cache", frames, None if narrow else torch.bfloat16)[0]
    assert other != []  # the other precision has features of its own
    again = fill_cache(source, lam, tmp_path / "cache", dtype=dtype)
    assert (again.frames, again.encoded, again.gigabytes) == (2 * FRAMES, 0, 0)


@pytest.mark.parametrize(("arguments", "size"), [({"frame_size": 24}, 24), ({"recorded": True}, None)])
def test_frames_of_another_size_reach_the_model_as_in_training(tmp_path, lam, arguments, size):
    source = disk.make_v2(tmp_path / "large", lengths=(6,), cameras=(disk.CAMERA,))
    fill_cache(source, lam, tmp_path / "cache", **arguments)
    assert train(lam, tmp_path / "cache", loaded(source, disk.CAMERA, size))[0] == []


def test_a_camera_and_some_episodes(tmp_path, lam, source):
    report = fill_cache(source, lam, tmp_path / "cache", cameras=["wrist"], episodes=["0:2"], skip=["0"])
    assert (report.cameras, report.episodes, report.frames) == ([disk.WRIST], 1, disk.LENGTHS[1])


def test_a_bound_ends_the_writing(tmp_path, lam, source, caplog):
    report = fill_cache(source, lam, tmp_path / "cache", max_gb=5 * 17 * 32 * 4 / 1e9)
    assert report.gigabytes == pytest.approx(5 * 17 * 32 * 4 / 1e9)
    assert caplog.text.count("no more frames are kept") == 1


def test_damaged_episodes_are_named_and_left_out(tmp_path, lam, source, caplog):
    next(source.rglob("*wrist/episode_000001.mp4")).write_bytes(b"no video")
    report = fill_cache(source, lam, tmp_path / "cache")
    assert report.episodes == 2
    assert list(report.left_out) == [1]
    assert "episode 1 is damaged and left out" in caplog.text
    for path in source.rglob("*.mp4"):
        path.write_bytes(b"no video")
    with pytest.raises(DatasetError, match="every episode is damaged"):
        fill_cache(source, lam, tmp_path / "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"), ({"frame_size": 0}, "frame_size=0"), ({"dtype": "float16"}, "dtype='float16'"),
        ({"frame_size": 24, "recorded": True}, "only one of them"), ({"cameras": ["front"]}, "name one of them"),
        ({"episodes": ["9"]}, "names none of the episodes"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(tmp_path, lam, source, arguments, message):
    with pytest.raises(LaraArgumentError, match=message):
        fill_cache(source, lam, tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_a_model_that_cannot_be_cached_is_refused(tmp_path, source, lam):
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(tmp_path / "tiny")
    config = LatentActionConfig(**describe_image_encoder(str(tmp_path / "mae")), **REST, difference_input=True)
    LatentActionModel(config).save_pretrained(tmp_path / "difference")
    for name, message in (("tiny", "no frozen image encoder"), ("difference", "depend on the frame gap")):
        with pytest.raises(LaraArgumentError, match=message):
            fill_cache(source, tmp_path / name, tmp_path / "cache")


def test_the_command(tmp_path, lam, source, capsys):
    pytest.importorskip("tyro")
    command = ["cache", str(source), "--lam", str(lam), "--output", str(tmp_path / "cache"), "--device", "cpu"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"{2 * FRAMES} frames of 3 episodes and 2 cameras" in out
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 0
    assert cli.main([*command, "--cameras", "front"]) == 2


@pytest.mark.slow
def test_processes_share_the_episodes(tmp_path, lam, source):
    pytest.importorskip("accelerate")
    command = ["-m", "lara_adapter.cli", "cache", source, "--lam", lam, "--output", tmp_path / "cache"]
    done = launch(*command, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["episodes"], report["frames"]) == (3, 2 * FRAMES)
    assert len(list((tmp_path / "cache").rglob("*.features"))) == 2
    assert train(lam, tmp_path / "cache", loaded(source, disk.CAMERA, 32))[0] == []
