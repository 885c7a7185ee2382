"""`lara health`: a healthy model, and each fault with its advice."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

from helpers import disk_datasets as disk
from test_model import small

from lara_adapter import DatasetError, LaraArgumentError, LatentActionConfig, LatentActionModel, cli
from lara_adapter.data.gap import Gap
from lara_adapter.data.video import VideoFile
from lara_adapter.lam.health import train_ceiling
from lara_adapter.lam.health.probe import cross_validated_r2
from lara_adapter.lam.health.report import examine
from lara_adapter.lam.health.verdicts import Thresholds
from lara_adapter.lam.pretrain.labelled import read_labelled

SIDE = 64
pytestmark = pytest.mark.slow  # a model is trained, once


def walk(episode: int, length: int, pixels: int, hold: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The square that `trained_tiny` knows, ten pixels further every `hold` frames; the actions are its moves."""
    random = np.random.default_rng(episode)
    frames = np.full((length, pixels, pixels, 3), 60, np.uint8)
    actions = np.zeros((length, 2), np.float32)
    x, y = random.integers(16, 36, 2)
    for time in range(length):
        frames[time, y : y + 14, x : x + 14, 0] = 230
        if (time + 1) % hold:
            continue
        steps = [
            (dx, dy) for dx, dy in ((10, 0), (-10, 0), (0, 10), (0, -10)) if 6 <= x + dx <= 46 and 6 <= y + dy <= 46
        ]
        actions[time] = steps[random.integers(len(steps))]
        x, y = x + int(actions[time, 0]), y + int(actions[time, 1])
    return frames, actions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return disk.make_v3(
        tmp_path_factory.mktemp("data") / "walk", lengths=(24,) * 10, per_file=5, pixels=SIDE, shoot=walk
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory, trained_tiny):
    """Folder of a healthy model, of one whose latent is constant, and of one that only copies the frame."""
    folder = tmp_path_factory.mktemp("models")
    trained_tiny.save_pretrained(folder / "healthy")
    constant = LatentActionModel(trained_tiny.config)
    constant.load_state_dict(trained_tiny.state_dict())
    with torch.no_grad():
        constant.inverse_dynamics.down[2].weight.zero_()
        constant.inverse_dynamics.down[2].bias.copy_(torch.linspace(-1, 1, 32))
    constant.save_pretrained(folder / "constant")
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(folder / "copies")  # a residual decoder starts at zero
    return folder


def states(report) -> dict[str, str]:
    return {finding.name: finding.state for finding in report.findings}


def finding_text(report, name: str) -> str:
    return next(finding.text for finding in report.findings if finding.name == name)


# ---------------------------------------------------------------------- verdicts


def test_a_healthy_model_is_healthy(models, data):
    report = examine(models / "healthy", data, gap=1, pairs=120)
    assert report.ok, str(report)
    assert set(states(report).values()) <= {"ok", "note"}
    assert [gap.gap for gap in report.gaps] == [1, 2, 4]
    first = report.gaps[0]
    assert first.measured.pairs >= 110
    assert first.measured.ratio < 0.9
    assert (first.still, first.lost) == (0, pytest.approx(1 / 24))
    # z shows where the square went, which is the action of a gap of one frame
    assert report.probes["mean"].r2 > 0.5
    assert report.probes["mean"].rows == first.measured.pairs
    assert report.probes["mean"].episodes == 10
    assert report.motion["action"].rows == first.measured.pairs
    assert "healthy" in str(report)
    assert "NOT" not in str(report)


def test_the_measures_are_those_of_the_frames_themselves(models, data, trained_tiny):
    """All pairs asked for: the numbers are the model's own health over every pair of the dataset."""
    report = examine(models / "healthy", data, gap=2, gaps=[2], pairs=10 * 22, batch_size=7)
    frames = [torch.from_numpy(walk(number, 24, SIDE)[0]).permute(0, 3, 1, 2) for number in range(10)]
    pairs = [(clip[:-2], clip[2:]) for clip in frames]
    expected = trained_tiny.health(pairs)
    found = report.gaps[0].measured
    assert found.pairs == expected.pairs == 220
    for name in ("reconstruction_loss", "copy_loss", "ratio", "perplexity", "latent_std", "mean_direction"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.02), name


def test_a_constant_latent_is_reported_as_a_collapse(models, data):
    report = examine(models / "constant", data, gap=1, pairs=60)
    assert not report.ok
    found = states(report)
    assert found["codes"] == found["latent"] == found["direction"] == "fail"
    for name in ("codes", "latent", "direction"):
        assert "collapse: " in finding_text(report, name)
    assert "alignment='contrastive'" in finding_text(report, "direction")
    assert found["frame gap"] == "ok"
    assert "NOT healthy" in str(report)


def test_a_model_that_copies_the_frame_fails_the_reconstruction(models, data):
    report = examine(models / "copies", data, gap=1, pairs=60)
    assert states(report)["reconstruction"] == "fail"
    assert "no better than copying: train longer" in finding_text(report, "reconstruction")
    assert report.gaps[0].measured.ratio == pytest.approx(1, abs=1e-3)


def test_a_gap_without_motion_is_too_small_and_a_better_one_is_named(models, tmp_path):
    slow = disk.make_v3(
        tmp_path / "slow", lengths=(40,) * 4, pixels=SIDE, shoot=lambda *arguments: walk(*arguments, hold=4)
    )
    report = examine(models / "healthy", slow, gap=1, gaps=[2, 4], pairs=120)
    assert states(report)["frame gap"] == "fail"
    assert report.gaps[0].still == pytest.approx(0.75, abs=0.08)
    assert "frame gap 1 is too small" in finding_text(report, "frame gap")
    assert "4 moves enough" in finding_text(report, "frame gap")
    better = examine(models / "healthy", slow, gaps=[1, 2, 4], pairs=120)
    assert (better.judged, better.chosen) == (4, False)
    assert better.ok, str(better)
    assert "frame gaps up to 2 are too small" in finding_text(better, "smaller gaps")
    assert "smaller gaps" not in states(report)


def test_a_gap_longer_than_most_clips_is_too_large(models, data):
    report = examine(models / "healthy", data, gap=14, pairs=60)
    assert states(report)["partners"] == "fail"
    assert "frame gap 14 is too large" in finding_text(report, "partners")


def test_larger_gaps_at_which_the_model_fails_are_noted(models, data):
    ratios = [gap.measured.ratio for gap in examine(models / "healthy", data, gap=1, gaps=[8], pairs=120).gaps]
    assert ratios[1] > ratios[0] + 0.02
    for limit, noted in ((sum(ratios) / 2, True), (ratios[1] + 0.01, False)):
        report = examine(models / "healthy", data, gap=1, gaps=[8], pairs=120, thresholds=Thresholds(ratio=limit))
        assert ("larger gaps" in states(report)) is noted
        assert report.ok


def test_thresholds_have_one_owner(models, data):
    report = examine(
        models / "healthy", data, gap=1, pairs=60, thresholds=Thresholds(mean_direction=0.0, perplexity_share=1)
    )
    assert (states(report)["direction"], states(report)["codes"]) == ("fail", "fail")
    assert states(report)["reconstruction"] == "ok"


def test_a_folder_of_videos_without_its_damaged_one(models, tmp_path, caplog):
    for number in range(3):
        disk.write_video(tmp_path / f"part/{number}.mp4", walk(number, 20, SIDE)[0])
    (tmp_path / "part/torn.mp4").write_bytes(b"no video")
    report = examine(models / "healthy", tmp_path, gap="0.1s", pairs=40)
    assert (report.judged, report.clips, report.camera) == (1, 3, None)
    assert states(report)["probe"] == "note"
    assert "no numeric column 'action'" in finding_text(report, "probe")
    assert "torn.mp4" in caplog.text
    alone = examine(models / "healthy", tmp_path / "part/1.mp4", gap=1, pairs=40)
    assert alone.clips == 1


def test_a_video_that_does_not_state_its_length_is_counted(models, tmp_path):
    import av

    disk.write_video(tmp_path / "stated.mkv", walk(0, 20, SIDE)[0])
    with av.open(str(tmp_path / "stated.mkv")) as source:
        packets = list(source.demux(video=0))
        with av.open(str(tmp_path / "live.mkv"), "w", options={"live": "1"}) as target:  # as a camera streams it
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in packets:
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    with VideoFile(tmp_path / "live.mkv") as video:
        assert video.length == 0
        assert video.count() == 20
        assert len(list(video.all_frames())) == 20
    live, stated = (
        examine(models / "healthy", tmp_path / f"{name}.mkv", gap=1, pairs=40) for name in ("live", "stated")
    )
    assert live.gaps == stated.gaps


# ---------------------------------------------------------------------- the probe


def test_the_probe_on_known_relations():
    g = torch.Generator().manual_seed(0)
    latent, episode = torch.randn(400, 12, generator=g), torch.arange(400) // 40
    target = latent[:, :3] @ torch.randn(3, 2, generator=g)
    noise = torch.randn(400, 2, generator=g) * target.std(0)
    assert cross_validated_r2(latent, target, episode).r2 > 0.999
    assert cross_validated_r2(latent, target + noise, episode).r2 == pytest.approx(0.5, abs=0.1)
    assert abs(cross_validated_r2(latent, noise, episode).r2) < 0.1
    still = torch.cat([target, torch.ones(400, 1)], 1)
    assert cross_validated_r2(latent, still, episode).r2 > 0.999  # a number that never changes does not count


def test_the_probe_ignores_what_only_identifies_the_episode():
    g = torch.Generator().manual_seed(0)
    episode = torch.arange(400) // 40
    latent = torch.nn.functional.one_hot(episode, 10).float()
    assert cross_validated_r2(latent, torch.randn(10, 2, generator=g)[episode], episode).r2 < 0.05


def test_the_probe_needs_episodes_and_something_to_predict():
    with pytest.raises(LaraArgumentError, match="at least 3 episodes, but there are 2"):
        cross_validated_r2(torch.randn(20, 3), torch.randn(20, 2), torch.arange(20) // 10)
    with pytest.raises(LaraArgumentError, match="never change"):
        cross_validated_r2(torch.randn(30, 3), torch.ones(30, 2), torch.arange(30) // 10)


# ---------------------------------------------------------------------- motion


def test_motion_with_states_and_a_ceiling(models, data, tmp_path, monkeypatch):
    """The dataset gets the square's place as its state; the ceiling is far better than a copy of the frame."""
    import json
    import shutil

    import pyarrow.parquet as pq

    folder = shutil.copytree(data, tmp_path / "walk")
    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        actions, episode = np.array(table["action"].to_pylist()), table["episode_index"].to_numpy()
        states = np.concatenate([actions[episode == n].cumsum(0) - actions[episode == n] for n in np.unique(episode)])
        column = disk.pa.FixedSizeListArray.from_arrays(disk.pa.array(states.reshape(-1).astype(np.float32)), 2)
        pq.write_table(table.append_column("observation.state", column), path)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"]["observation.state"] = {"dtype": "float32", "shape": [2], "names": None}
    (folder / "meta/info.json").write_text(json.dumps(info))

    monkeypatch.setattr(
        "lara_adapter.lam.health.actions.train_ceiling", functools.partial(train_ceiling, widths=(4,), epochs=2)
    )
    report = examine(models / "healthy", folder, gap=1, gaps=[1], pairs=230, ceiling=True)
    moved, action = report.motion["displacement"], report.motion["action"]
    # at a gap of one frame the displacement is the action
    assert moved.pair.value == pytest.approx(action.pair.value, abs=1e-6)
    assert moved.known is not None
    assert moved.ceiling is not None
    assert moved.rows == 230
    assert moved.beyond.value > 0.3  # z of this model shows where the square went
    assert "ceiling beyond the present" in finding_text(report, "motion")
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["motion"]["displacement"]["beyond"]["value"] == pytest.approx(moved.beyond.value)
    constant = examine(models / "constant", folder, gap=1, gaps=[1], pairs=230)
    assert constant.motion["displacement"].beyond.value == pytest.approx(0, abs=0.05)
    assert "can be seen, but z does not hold it" in finding_text(constant, "motion")


# ---------------------------------------------------------------------- refusals and the command


def test_data_that_the_lam_learnt_from_are_named(models, data, tmp_path):
    model = LatentActionModel.from_pretrained(models / "healthy")
    labels = read_labelled(data, Gap(frames=1), (), SIDE, seed=0)
    model.config = dataclasses.replace(model.config, labelled_by=labels.fingerprint)
    model.save_pretrained(tmp_path / "taught")
    text = finding_text(examine(tmp_path / "taught", data, gap=1, pairs=20), "labels")
    assert text.startswith("the LAM learnt from these very actions")
    for lam, some in ((models / "healthy", ()), (tmp_path / "taught", ("0:5",))):
        report = examine(lam, data, gap=1, pairs=20, episodes=some)
        assert "labels" not in {finding.name for finding in report.findings}


def test_refusals(models, data, tmp_path):
    with pytest.raises(DatasetError, match=r"holds nothing that can be read. Expected: meta/info\.json"):
        examine(models / "healthy", tmp_path)
    with pytest.raises(DatasetError, match=r"no clip is longer than the frame gap of 30; the longest has 24 frames"):
        examine(models / "healthy", data, gap=30)
    with pytest.raises(LaraArgumentError, match="pairs=1"):
        examine(models / "healthy", data, pairs=1)
    with pytest.raises(LaraArgumentError, match="camera='side'"):
        examine(models / "healthy", data, camera="side")


def test_the_command_and_its_exit_status(models, data, capsys, tmp_path):
    pytest.importorskip("tyro")
    small().save_pretrained(tmp_path / "untrained")
    assert cli.main(["health", str(models / "healthy"), str(data), "--gap", "1", "--pairs", "60"]) == 0
    out = capsys.readouterr().out
    assert "1 (0.10 s) *" in out
    assert out.rstrip().endswith("healthy")
    assert cli.main(["health", str(models / "constant"), str(data), "--gaps", "1", "2", "--pairs", "60", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    assert [gap["gap"] for gap in content["gaps"]] == [1, 2]
    assert content["gaps"][0]["measured"]["latent_std"] < 1e-3
    assert {finding["name"] for finding in content["findings"] if finding["state"] == "fail"} >= {"latent", "direction"}
    assert cli.main(["health", str(models / "healthy"), str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_json_holds_no_nan(models, tmp_path):
    still = np.full((12, SIDE, SIDE, 3), 90, np.uint8)
    disk.write_video(tmp_path / "still.mp4", still)
    report = examine(models / "healthy", tmp_path, gaps=[1, 2], pairs=10)
    assert math.isnan(report.gaps[0].measured.ratio)
    assert not report.ok
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["gaps"][0]["measured"]["ratio"] is None
    assert "no gap measured moves enough" in finding_text(report, "frame gap")


@pytest.mark.long
def test_two_processes_give_the_report_of_one(models, data, tmp_path):
    pytest.importorskip("accelerate")
    command = ["health", str(models / "healthy"), str(data), "--gap", "2", "--pairs", "24", "--device", "cpu", "--json"]
    one = subprocess.run([sys.executable, "-m", "lara_adapter.cli", *command], capture_output=True, text=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "lara_adapter.cli",
    ]
    two = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr[-2000:]
    assert json.loads(two.stdout) == json.loads(one.stdout)


def test_actions_that_are_not_finite_are_said_with_episode_and_column(models, tmp_path):
    def shoot(episode, length, pixels):
        frames, actions = walk(episode, length, pixels)
        if episode == 2:
            actions[10:13, 1] = np.nan
        if episode == 5:
            actions[7, 0] = np.inf
        return frames, actions

    data = disk.make_v3(tmp_path / "walk", lengths=(24,) * 10, per_file=5, pixels=SIDE, shoot=shoot)
    report = examine(models / "healthy", data, gap=2, gaps=[2], pairs=120)
    (said,) = [finding for finding in report.findings if finding.name == "actions"]
    assert "episode 2, action[1], 3 frames from 10 on; episode 5, action[0], 1 frames from 7 on" in said.text
    assert math.isfinite(report.probes["mean"].r2)
    assert 100 < report.probes["mean"].rows < 120
    every = disk.make_v3(
        tmp_path / "nan",
        lengths=(24,) * 4,
        pixels=SIDE,
        shoot=lambda *a: (walk(*a)[0], np.full((24, 2), np.nan, np.float32)),
    )
    (probe,) = [f for f in examine(models / "healthy", every, gap=2, gaps=[2], pairs=40).findings if f.name == "probe"]
    assert probe.text == "not made: no pair has finite actions"
