"""The datasets of examples/libero/record.py: layout, and our readers. The hosts' own: tests/hosts/test_*_libero.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("av", reason="PyAV is not installed (extra video)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra video)")

from helpers.libero_episodes import toy_episode, toy_recording

from examples.libero.dataset import FPS, VIEWS, Recording
from examples.libero.metadata import image_stats, join_stats, vector_stats
from lara_adapter.data.episodes import EpisodeDataset


@pytest.mark.parametrize("layout", ["v3.0", "v2.1"])
@pytest.mark.parametrize("actions", [True, False])
def test_our_reader_reads_it(tmp_path, layout, actions):
    dataset = EpisodeDataset(toy_recording(tmp_path / "data", layout, actions))
    assert (dataset.version, dataset.fps, len(dataset.episodes), dataset.total_frames) == (layout, FPS, 3, 41)
    assert dataset.cameras == tuple(VIEWS.values())
    assert not dataset.check(dataset.cameras, rows=True)
    expected = toy_episode(20, actions=actions)
    episode = dataset.episode(1)
    read = dataset.rows(episode, ["observation.state", "timestamp", "index", "task_index"])
    assert np.array_equal(read["observation.state"], expected.states)
    assert np.array_equal(read["index"], 12 + np.arange(20))
    assert np.allclose(read["timestamp"], np.arange(20) / FPS)
    found = dataset.actions(episode)
    assert np.array_equal(found, expected.actions) if actions else found is None
    for (_, frames), view in zip(
        [next(dataset.frames(camera, [episode])) for camera in dataset.cameras], VIEWS, strict=True
    ):
        assert np.abs(np.stack(list(frames)).astype(int) - expected.views[view]).max() < 6


def test_statistics_are_those_of_all_frames(tmp_path):
    root = toy_recording(tmp_path / "data")
    stats = json.loads((root / "meta/stats.json").read_text())
    states = np.concatenate([toy_episode(length).states for length in (12, 20, 9)]).astype(float)
    assert np.allclose(stats["observation.state"]["mean"], states.mean(0))
    assert np.allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0))
    assert stats["action"]["count"] == [41]
    assert np.shape(stats[VIEWS["image"]]["mean"]) == (3, 1, 1)


def test_joined_statistics_are_exact():
    values = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    joined = join_stats([vector_stats(values[:7]), vector_stats(values[7:])])
    whole = vector_stats(values)
    for name in ("min", "max", "mean", "std", "count"):
        assert np.allclose(joined[name], whole[name]), name
    white = image_stats(np.full((5, 4, 4, 3), 255, np.uint8))
    assert np.allclose(white["mean"], 1)


def test_the_modality_file_names_every_dimension(tmp_path):
    modality = json.loads((toy_recording(tmp_path / "data") / "meta/modality.json").read_text())
    for kind, width in (("state", 8), ("action", 7)):
        covered = [i for part in modality[kind].values() for i in range(part["start"], part["end"])]
        assert sorted(covered) == list(range(width))  # JSON is written in order of keys
    assert {part["original_key"] for part in modality["video"].values()} == set(VIEWS.values())
    without = json.loads((toy_recording(tmp_path / "play", actions=False) / "meta/modality.json").read_text())
    assert "action" not in without


def test_a_longer_recording_keeps_the_files_of_the_shorter(tmp_path):
    root = toy_recording(tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.mp4")}
    with Recording(root, "v3.0", 32, True, {"suite": "toy"}) as recording:
        recording.add("take the box", toy_episode(15), start=15)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(EpisodeDataset(root).episodes) == 4
