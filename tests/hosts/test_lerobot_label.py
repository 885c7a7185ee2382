"""`lara label` on datasets that LeRobot recorded; its own LeRobotDataset reads the copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-lerobot")

from helpers.lerobot_disk import LENGTHS, TOP, WRIST, make_dataset, open_dataset
from helpers.videos import abandon_decoders
from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.compute_stats import aggregate_stats, get_feature_stats
from lerobot.datasets.dataset_tools import delete_episodes, remove_feature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.feature_utils import dataset_to_policy_features

from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.lam.label import label_dataset

C = 5
ENDS = np.cumsum(LENGTHS)
FEATURES = {"lara.indices", "lara.latent", "lara.valid"}


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lam") / "lam"
    LatentActionModel(LatentActionConfig.tiny(image_size=32, queries=4, latent_dim=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["video", "image"])
def labelled(request, tmp_path_factory, lam):
    """(kind, source, copy)"""
    base = tmp_path_factory.mktemp(request.param)
    source = make_dataset(base / "source", request.param, cameras=(TOP, WRIST))
    label_dataset(source, lam, base / "copy", gap=C, camera="wrist", batch_size=7)
    return request.param, source, base / "copy"


def test_lerobot_yields_the_latent_of_its_own_frames(labelled, lam):
    """Every frame as LeRobot decodes it, the pair as LeRobot's delta_timestamps forms it, and its padding flag."""
    _, source, copy = labelled
    dataset = open_dataset(copy)
    pairs = open_dataset(source, delta_timestamps={WRIST: [0.0, C / dataset.fps]})
    model = LatentActionModel.from_pretrained(lam)
    assert len(dataset) == sum(LENGTHS)
    for number in range(len(dataset)):
        item, pair = dataset[number], pairs[number]
        with torch.no_grad():
            expected = model.encode(pair[WRIST][:1], pair[WRIST][1:])
        assert (item["lara.latent"].dtype, item["lara.latent"].shape) == (torch.float32, (32,))
        assert (item["lara.indices"].dtype, item["lara.valid"].dtype) == (torch.int64, torch.bool)
        torch.testing.assert_close(item["lara.latent"], expected.continuous.flatten(), rtol=1e-4, atol=1e-5)
        assert torch.equal(item["lara.indices"], expected.indices[0])
        assert bool(item["lara.valid"]) is not bool(pair[f"{WRIST}_is_pad"][1])


def test_everything_else_is_as_before(labelled):
    _, source, copy = labelled
    old, new = open_dataset(source), open_dataset(copy)
    assert new.meta.features.keys() == old.meta.features.keys() | FEATURES
    for column in old.hf_dataset.column_names:
        before, after = (dataset.hf_dataset.with_format("arrow").data.column(column) for dataset in (old, new))
        assert after.equals(before), column
    for number in (0, 17, len(old) - 1):
        before, after = old[number], new[number]
        assert after.keys() == before.keys() | FEATURES
        assert all(torch.equal(after[key], before[key]) for key in before if isinstance(before[key], torch.Tensor))
        assert after["task"] == before["task"]
    assert new.meta.stats.keys() == old.meta.stats.keys() | FEATURES
    for key, stats in old.meta.stats.items():
        assert all(np.array_equal(value, new.meta.stats[key][name]) for name, value in stats.items()), key


def test_the_statistics_are_those_that_lerobot_would_keep(labelled):
    _, _, copy = labelled
    dataset = open_dataset(copy)
    for name in FEATURES:
        values = np.array(dataset.hf_dataset.with_format("numpy")[name][:]).astype(np.float64)
        values = values.reshape(len(values), -1)
        parts = [{name: get_feature_stats(part, axis=0, keepdims=False)} for part in np.split(values, ENDS[:-1])]
        expected, found = aggregate_stats(parts)[name], dataset.meta.stats[name]
        assert found.keys() == expected.keys()
        for kind in ("min", "max", "mean", "std", "count"):
            np.testing.assert_allclose(found[kind], expected[kind], rtol=1e-6, atol=1e-6)
        spread = expected["max"] - expected["min"] + 1e-9
        for kind in (
            "q10",
            "q50",
            "q90",
        ):  # theirs interpolates in a histogram, ours is exact: near for many values only
            assert (np.abs(found[kind] - expected[kind]) <= 0.35 * spread).all()


def test_a_dataloader_and_delta_timestamps(labelled):
    _, _, copy = labelled
    ahead = open_dataset(copy, episodes=[1, 2], delta_timestamps={"lara.latent": [0.0, 1 / 30, 2 / 30]})
    loader = torch.utils.data.DataLoader(ahead, batch_size=8, shuffle=False)
    batch = next(iter(loader))
    assert batch["lara.latent"].shape == (8, 3, 32)
    assert batch["lara.indices"].shape == (8, 4)
    assert batch["lara.valid"].tolist() == [True] * 4 + [False] * 4  # episode 1 has nine frames
    assert torch.equal(batch["lara.latent"][0, 1], batch["lara.latent"][1, 0])
    assert torch.equal(batch["lara.latent"][7, 1], batch["lara.latent"][7, 2])  # clamped to the last frame
    assert not torch.equal(batch["lara.latent"][7, 0], batch["lara.latent"][7, 1])


def test_policies_of_lerobot_do_not_take_the_labels_for_inputs(labelled):
    _, _, copy = labelled
    assert not FEATURES & dataset_to_policy_features(open_dataset(copy).meta.features).keys()


def test_lerobots_own_tools_take_the_copy(labelled, tmp_path):
    """Deleting an episode and merging datasets keep the labels, values and statistics."""
    _, _, copy = labelled
    whole = open_dataset(copy)
    fewer = delete_episodes(whole, [0], output_dir=tmp_path / "fewer", repo_id="local/fewer")
    fewer = LeRobotDataset("local/fewer", root=fewer.root)
    assert len(fewer) == sum(LENGTHS[1:])
    assert torch.equal(fewer[0]["lara.latent"], whole[LENGTHS[0]]["lara.latent"])
    assert fewer.meta.stats["lara.latent"]["count"].item() == sum(LENGTHS[1:])
    aggregate_datasets(["local/tiny", "local/tiny"], "local/twice", [copy, copy], tmp_path / "twice")
    twice = LeRobotDataset("local/twice", root=tmp_path / "twice")
    assert len(twice) == 2 * sum(LENGTHS)
    assert torch.equal(twice[sum(LENGTHS) + 3]["lara.indices"], whole[3]["lara.indices"])


def test_demonstrations_and_video_become_one_dataset(tmp_path, lam):
    """Video without actions and states, labelled by demonstrations, is merged with them by LeRobot's own tool."""
    demos = make_dataset(tmp_path / "demos")
    video = make_dataset(tmp_path / "video")
    known = remove_feature(open_dataset(video), ["action", "observation.state"], tmp_path / "bare", "local/bare").root
    label_dataset(demos, lam, tmp_path / "demos-labelled", gap=C)
    report = label_dataset(known, lam, tmp_path / "video-labelled", gap=C, actions=demos, least_r2=-100.0)
    assert report.features[-2:] == ("action", "observation.state")
    parts = [tmp_path / "demos-labelled", tmp_path / "video-labelled"]
    aggregate_datasets(["local/demos", "local/video"], "local/both", parts, tmp_path / "both")
    both = LeRobotDataset("local/both", root=tmp_path / "both", delta_timestamps={"action": [0.0, 1 / 30]})
    assert len(both) == 2 * sum(LENGTHS)
    first, second = both[3], both[sum(LENGTHS) + 3]
    assert first.keys() == second.keys()
    assert second["action"].shape == (2, 3)
    assert torch.equal(first["observation.state"], torch.full((4,), 3.0))
    assert torch.allclose(
        second["observation.state"], torch.full((4,), np.concatenate(list(map(np.arange, LENGTHS))).mean())
    )
    policy_features = dataset_to_policy_features(both.meta.features)
    assert {"action", "observation.state", TOP} == policy_features.keys()


def test_lerobot_takes_a_copy_with_an_episode_that_has_no_labels(tmp_path, lam):
    """Its rows are zeros, and its statistics count nothing where LeRobot puts episodes together."""
    source = make_dataset(tmp_path / "source", "image")
    label_dataset(source, lam, tmp_path / "copy", gap=C, skip=["1"])
    dataset = open_dataset(tmp_path / "copy")
    latent = np.array(dataset.hf_dataset.with_format("numpy")["lara.latent"][:])
    valid = np.array(dataset.hf_dataset.with_format("numpy")["lara.valid"][:])
    first, second, third = np.split(latent.astype(np.float64), ENDS[:-1])
    assert not second.any()
    assert not valid[ENDS[0] : ENDS[1]].any()
    np.testing.assert_allclose(dataset.meta.stats["lara.latent"]["min"], np.minimum(first.min(0), third.min(0)))
    fewer = delete_episodes(dataset, [0], output_dir=tmp_path / "fewer", repo_id="local/fewer")
    stats = LeRobotDataset("local/fewer", root=fewer.root).meta.stats["lara.latent"]
    assert stats["count"].item() == LENGTHS[2]
    np.testing.assert_allclose(stats["mean"], third.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(stats["std"], third.std(0), rtol=1e-6, atol=1e-9)


def test_half_precision_latents(tmp_path, lam):
    source = make_dataset(tmp_path / "source", "image")
    for dtype in ("float32", "float16"):
        label_dataset(source, lam, tmp_path / dtype, gap=C, latent_dtype=dtype)
    full, half = (open_dataset(tmp_path / dtype) for dtype in ("float32", "float16"))
    assert half.hf_dataset.features["lara.latent"].feature.dtype == "float16"
    for number in (0, 9, 40):
        torch.testing.assert_close(
            half[number]["lara.latent"], full[number]["lara.latent"].half().to(half[number]["lara.latent"].dtype)
        )


def test_a_decoder_of_lerobots_pyav_is_put_away_without_a_deadlock(tmp_path):
    found = abandon_decoders(tmp_path)
    assert found.stdout == "done\n", found.stderr
