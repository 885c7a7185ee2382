"""`lara train-lam --actions`: a few demonstrations in the training of a LAM."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("tqdm")

from helpers import disk_datasets as disk
from helpers.interrupted import interrupted
from test_pretrain import ENVIRONMENT, SMALL, same

from lara_adapter import FrameError, LaraArgumentError, LatentActionConfig, LatentActionModel
from lara_adapter.data.gap import Gap
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
from lara_adapter.lam.pretrain.augment import augment
from lara_adapter.lam.pretrain.labelled import read_labelled
from lara_adapter.storage.files import read_tensors

GAP = 2


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    shoot = {"video": 0, "known": 50}
    return {
        name: disk.make_v3(
            folder / name, lengths=(40,) * (12 if name == "video" else 6), pixels=32,
            shoot=lambda episode, length, pixels, first=first: disk.scene(first + episode, length, pixels),
        )
        for name, first in shoot.items()
    }  # fmt: skip


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def settings_of(sets, output, config, **changes):
    given = {
        "preset": "tiny", "config": config, "steps": 12, "batch_size": 8, "workers": 1, "save_every": 4, "health_every": 6,
        "health_pairs": 16, "shuffle_frames": 120, "log_every": 4, "gap": str(GAP), "cut_threshold": 0.0,
        "still_threshold": 0.0, "actions": sets["known"],
    }  # fmt: skip
    return PretrainSettings(videos=(sets["video"],), output=output, **{**given, **changes})


def test_the_pairs_are_those_of_the_dataset(sets):
    pairs = read_labelled(sets["known"], Gap(frames=GAP), (), 32, seed=1)
    true = [disk.scene(50 + episode, 40, 32) for episode in range(6)]
    shown = torch.from_numpy(np.concatenate([frames for frames, _ in true])).permute(0, 3, 1, 2)
    assert (pairs.frames.int() - shown.int()).abs().max() <= 3  # YUV rounds
    assert pairs.present.tolist() == [40 * episode + t for episode in range(6) for t in range(40 - GAP)]
    assert torch.equal(pairs.future, pairs.present + GAP)
    means = np.concatenate([[a[t : t + GAP].mean(0) for t in range(40 - GAP)] for _, a in true])
    assert np.allclose(pairs.actions, (means - means.mean(0)) / means.std(0), atol=1e-5)
    drawn, again, other = (pairs.draw(5, 3, rank, augmented=True) for rank in (0, 0, 1))
    assert [list(each.shape) for each in drawn] == [[5, 3, 32, 32], [5, 3, 32, 32], [5, 2]]
    assert all(torch.equal(one, two) for one, two in zip(drawn, again))
    assert not torch.equal(drawn.actions, other.actions)
    plain = pairs.draw(5, 3)
    assert torch.equal(plain.actions, drawn.actions)
    assert not torch.equal(plain.present, drawn.present)


def test_cameras_are_those_of_the_video_where_the_demonstrations_have_them(tmp_path):
    views = tuple(f"observation.images.{name}" for name in ("top", "wrist"))
    both = disk.make_v3(tmp_path / "both", lengths=(9, 7), cameras=views, pixels=32)
    counts = {names: len(read_labelled(both, Gap(frames=GAP), names, 32, 0).present)
              for names in ((), ("wrist",), ("observation.images.top", "other"), ("other",))}  # fmt: skip
    assert counts == {(): 24, ("wrist",): 12, ("observation.images.top", "other"): 12, ("other",): 24}


def test_augmented_frames():
    frames = torch.full((64, 3, 40, 40), 100, dtype=torch.uint8)
    seen = augment(frames, (1, 2))
    assert (seen.dtype, seen.shape) == (frames.dtype, frames.shape)
    assert torch.equal(seen, augment(frames, (1, 2)))
    assert not torch.equal(seen, augment(frames, (1, 3)))
    assert not torch.equal(seen[0], seen[1])  # each its own
    light = seen.flatten(2).mode(-1).values[:, 0]  # most of a frame is as it was, in another light
    assert 70 <= int(light.min()) < 80
    assert 120 < int(light.max()) <= 130
    covered = (seen != light[:, None, None, None]).any(1).float().mean((1, 2))
    assert float(covered.min()) >= 0.02
    assert 0.1 < float(covered.max()) <= 0.2


def test_what_is_seen_is_not_what_is_predicted(sets):
    lam = LatentActionModel(LatentActionConfig.tiny(**SMALL)).eval()
    frames = read_labelled(sets["known"], Gap(frames=GAP), (), 16, seed=1).frames
    now, later = frames[:8], frames[2:10]
    seen = augment(now, (1,)), augment(later, (2,))
    plain, other = lam(now, later), lam(now, later, seen=seen)
    assert torch.equal(lam(now, later, seen=(now, later)).loss, plain.loss)
    assert torch.equal(other.latent.continuous, lam.encode(*seen).continuous)
    assert torch.equal(other.copy_loss, plain.copy_loss)
    assert not torch.equal(other.latent.continuous, plain.latent.continuous)
    with pytest.raises(FrameError, match="like the frames, is expected"):
        lam(now, later, seen=(seen[0][:4], seen[1][:4]))


def test_z_is_trained_to_hold_the_actions(sets, small, tmp_path, caplog):
    changes = {"steps": 300, "batch_size": 16, "save_every": 300, "log_every": 60, "health_every": 300, "lr": 2e-3}
    with caplog.at_level(logging.INFO):
        pretrain_lam(settings_of(sets, tmp_path / "labelled", small, **changes))
    errors = [float(each) for each in re.findall(r"action error ([0-9.]+) \(1: their mean\)", caplog.text)]
    assert len(errors) == 6
    assert errors[-1] < 0.75 < max(errors)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pretrain_lam(settings_of(sets, tmp_path / "alone", small, actions=None, **changes))
    assert "action error" not in caplog.text
    one, other = (read_tensors(tmp_path / name / "model.safetensors") for name in ("labelled", "alone"))
    assert one.keys() == other.keys()  # what reads the actions is thrown away
    assert not torch.equal(one["inverse_dynamics.queries"], other["inverse_dynamics.queries"])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("labelled", "alone")]
    assert configs[0].pop("labelled_by") != configs[1].pop("labelled_by") is None
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "bf16": True, "ema": 0.9, "reconstruct": 0.5, "augment": True}], ids=str
)
def test_a_resumed_run_ends_with_the_same_bits(sets, small, tmp_path, changes):
    whole = settings_of(sets, tmp_path / "whole", small, **changes)
    pretrain_lam(whole)
    broken = dataclasses.replace(whole, output=tmp_path / "broken")
    interrupted(broken, 6)
    pretrain_lam(broken)
    assert same(tmp_path / "whole", tmp_path / "broken")
    last = "checkpoints/step-00000012"
    assert same(tmp_path / "whole" / last, tmp_path / "broken" / last)
    assert "head.0.weight" in read_tensors(tmp_path / "whole" / last / "model.safetensors")
    with pytest.raises(LaraArgumentError, match=r"action_weight was 1\.0 and is 2\.0"):
        pretrain_lam(dataclasses.replace(broken, action_weight=2.0))


TWO = """
import sys
from pathlib import Path
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam
video, known, output, config = map(Path, sys.argv[1:])
pretrain_lam(PretrainSettings(
    videos=(video,), actions=known, output=output, config=config, preset="tiny", steps=4, batch_size=4, workers=1,
    gap="2", shuffle_frames=120, cut_threshold=0.0, still_threshold=0.0))
"""


def test_two_processes(sets, small, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "two.py")]
    done = subprocess.run(
        [sys.executable, *run, str(sets["video"]), str(sets["known"]), str(tmp_path / "out"), str(small)],
        env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out/checkpoints/step-00000004/state.json").read_text())["processes"] == 2


def test_refusals(sets, small, tmp_path):
    bare = disk.make_v3(tmp_path / "short", lengths=(2, 2), pixels=32)
    still = disk.make_v3(
        tmp_path / "still", lengths=(9, 9), pixels=32,
        shoot=lambda episode, length, pixels: (disk.scene(episode, length, pixels)[0], np.ones((length, 2), np.float32)),
    )  # fmt: skip
    for actions, message in (
        (bare, "no episode of short is longer than the gap of 2 frames"),
        (still, "the actions of still never change"),
        (tmp_path / "none", "none"),
    ):
        with pytest.raises(Exception, match=message) as caught:
            pretrain_lam(settings_of(sets, tmp_path / "out", small, actions=actions))
        assert type(caught.value).__module__ == "lara_adapter.errors"
    with pytest.raises(LaraArgumentError, match="action_weight=0"):
        settings_of(sets, tmp_path / "out", small, action_weight=0.0)
    videos = tmp_path / "videos"
    videos.mkdir()
    disk.write_video(videos / "a.mp4", disk.scene(0, 20, 32)[0])
    with pytest.raises(LaraArgumentError, match="videos does not have a column 'action' of numbers"):
        pretrain_lam(settings_of(sets, tmp_path / "out", small, actions=videos))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_still_pair_stays_the_zero_latent_through_training_with_labels_and_augmentation(sets, tmp_path):
    config = tmp_path / "still.json"
    config.write_text(json.dumps({**SMALL, "subtract_still": True}))
    output = pretrain_lam(settings_of(sets, tmp_path / "run", config, augment=True)).output
    lam = LatentActionModel.from_pretrained(output)
    assert lam.config.subtract_still
    frames = read_labelled(sets["known"], Gap(frames=GAP), (), 16, seed=1).frames[:8]
    assert lam.encode(frames, frames).continuous.abs().max() < 1e-5
    assert lam.encode(frames[:-4], frames[4:]).continuous.abs().mean() > 1e-3  # it has hardly learnt yet
