"""`lara attention`: the arrays are the model's own attention, and the pictures show them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

from helpers import disk_datasets as disk
from test_model import small

from lara_adapter import DatasetError, LaraArgumentError, LatentActionModel, cli
from lara_adapter.data.video import decode_picture
from lara_adapter.lam.attention.picture import draw
from lara_adapter.lam.attention.report import measure_attention, save_arrays

GAP = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return disk.make_v3(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("lam", "lara-lam")):
        torch.manual_seed(seed)
        small(initializer_range=0.5).save_pretrained(folder / name)
    return folder


def picture(path) -> np.ndarray:
    return decode_picture(path.read_bytes(), str(path))


def test_the_arrays_are_the_models_attention_and_sum_to_one(models, data, tmp_path):
    report = measure_attention(models / "lam", data, gap=GAP, frames=["0:2", "2:7", "2:0"])
    save_arrays(report, tmp_path / "attention.npz")
    arrays = np.load(tmp_path / "attention.npz", allow_pickle=False)
    assert arrays["clip"].tolist() == ["episode 0", "episode 2", "episode 2"]
    assert arrays["frame"].tolist() == [2, 7, 0]
    assert arrays["gap"] == GAP
    model = LatentActionModel.from_pretrained(models / "lam")
    for number, (episode, time) in enumerate(((0, 2), (2, 7), (2, 0))):
        frames = disk.scene(episode, disk.LENGTHS[episode])[0]
        # the codec keeps the squares to a grey value or two
        assert np.abs(arrays["present"][number].astype(int) - frames[time]).mean() < 2
        assert np.abs(arrays["future"][number].astype(int) - frames[time + GAP]).mean() < 2
        pair = [torch.from_numpy(arrays[name][number]).permute(2, 0, 1)[None] for name in ("present", "future")]
        np.testing.assert_allclose(arrays["attention_0"][number], model.attention(*pair)[0].numpy(), atol=1e-6)
    assert arrays["attention_0"].shape == (3, 2, 2, 3, 2, 4, 4)  # pairs, layers, heads, queries, frames, patches
    total = arrays["attention_0"].sum(axis=(4, 5, 6)) + arrays["rest_0"]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (arrays["rest_0"] > 0).all()
    np.testing.assert_allclose(arrays["maps_0"].sum(axis=(2, 3, 4)), 1, atol=1e-5)
    expected = arrays["attention_0"][:, -1].mean(1)
    np.testing.assert_allclose(arrays["maps_0"], expected / expected.sum((2, 3, 4), keepdims=True), atol=1e-6)
    assert "attention_1" not in arrays


@pytest.mark.long
def test_two_models_side_by_side(models, data, tmp_path):
    pytest.importorskip("matplotlib")
    report = measure_attention(models / "lam", data, gap=GAP, compare=models / "lara-lam", pairs=2)
    save_arrays(report, tmp_path / "two.npz")
    arrays = np.load(tmp_path / "two.npz")
    assert (str(arrays["model_0"]), str(arrays["model_1"])) == ("lam", "lara-lam")
    assert not np.allclose(arrays["maps_0"], arrays["maps_1"])
    draw(report, tmp_path / "two.png")
    draw(report._replace(models=report.models[:1]), tmp_path / "one.png")
    two, one = picture(tmp_path / "two.png"), picture(tmp_path / "one.png")
    assert two.shape[1] > one.shape[1] > 300
    assert len(np.unique(two.reshape(-1, 3), axis=0)) > 500  # heat maps and frames, not an empty sheet
    draw(report._replace(models=report.models[::-1]), tmp_path / "other.png")
    assert not np.array_equal(picture(tmp_path / "other.png"), two)
    draw(report, tmp_path / "queries.png", queries=True)
    assert picture(tmp_path / "queries.png").shape[1] > 2 * two.shape[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.png",
        "other.png",
        "queries.png",
        "two.npz",
        "two.png",
    ]


def test_models_of_one_name_are_distinguished(models, data, tmp_path):
    torch.manual_seed(5)
    small().save_pretrained(tmp_path / "lam")
    names = [
        model.name
        for model in measure_attention(models / "lam", data, gap=GAP, compare=tmp_path / "lam", pairs=1).models
    ]
    assert len(set(names)) == 2
    assert all(name.startswith("lam ") for name in names)


def test_the_numbers_by_hand(models, data):
    report = measure_attention(models / "lam", data, gap=GAP, frames=["0:2"])
    maps = np.zeros((1, 1, 3, 3, 2, 4, 4), np.float32)  # one pair, layer; three heads and queries
    maps[..., 1, 0, 0] = 1.0  # all on the first patch of the future frame
    moved = np.zeros((32, 32, 3), np.uint8)
    moved[:8, :16] = 200  # the first two of its patches change
    report = report._replace(
        present=[np.zeros_like(moved)], future=[moved], models=[report.models[0]._replace(attention=maps)]
    )
    (numbers,) = report.numbers()
    assert numbers["present"] == 0
    assert numbers["on_motion"] == pytest.approx(1 / (2 / 16))
    assert numbers["entropy"] == pytest.approx(0, abs=1e-6)
    even = report._replace(models=[report.models[0]._replace(attention=np.full_like(maps, 1 / 32))])
    assert even.numbers()[0] == {
        "model": "lam", "present": pytest.approx(0.5), "on_motion": pytest.approx(1), "entropy": pytest.approx(1),
    }  # fmt: skip
    still = report._replace(future=report.present)
    assert still.numbers()[0]["on_motion"] is None


def test_pairs_are_spread_evenly_and_have_a_partner(models, data):
    report = measure_attention(models / "lam", data, gap=8, pairs=5)
    assert len(set(report.pairs)) == 5
    assert {name for name, _ in report.pairs} == {"episode 0", "episode 2"}  # of the other one a single pair
    lengths = dict(zip(("episode 0", "episode 1", "episode 2"), disk.LENGTHS))
    assert all(place + 8 < lengths[name] for name, place in report.pairs)


def test_a_video_or_a_folder_of_them(models, tmp_path):
    for number in range(2):
        disk.write_video(tmp_path / f"{number}.mp4", disk.scene(number, 10, 32 + 32 * number)[0])
    report = measure_attention(models / "lam", tmp_path, gap="0.3s", frames=["1:4", "2"])
    assert report.pairs == [("1.mp4", 4), ("0.mp4", 2)]
    assert [frame.shape[0] for frame in report.present] == [64, 32]
    save_arrays(report, tmp_path / "a.npz")  # frames of two sizes
    assert np.load(tmp_path / "a.npz")["present_0"].shape == (64, 64, 3)
    alone = measure_attention(models / "lam", tmp_path / "1.mp4", gap=GAP, frames=["0:4"])
    assert np.array_equal(alone.models[0].attention[0], report.models[0].attention[0])


def test_videos_of_one_name_in_two_folders_are_distinguished(models, tmp_path):
    for number, folder in enumerate(("left", "right")):
        disk.write_video(tmp_path / folder / "0.mp4", disk.scene(number, 10)[0])
    report = measure_attention(models / "lam", tmp_path, gap=GAP, frames=["0:2", "1:2"])
    assert [name for name, _ in report.pairs] == ["left/0.mp4", "right/0.mp4"]
    for number, frame in enumerate(report.present):
        assert np.array_equal(frame, disk.scene(number, 10)[0][2])


def test_refusals(models, data, tmp_path):
    for frames, message in (
        (["9:0"], "not this one"), (["x"], '"CLIP:FRAME" or "FRAME" is expected'), (["-1:2"], '"CLIP:FRAME" or "FRAME"'),
        (["1:7"], "episode 1 has no frame 10, which is 3 after frame 7"),
    ):  # fmt: skip
        with pytest.raises(LaraArgumentError, match=message):
            measure_attention(models / "lam", data, gap=GAP, frames=frames)
    with pytest.raises(LaraArgumentError, match="layer=2, but lam has 2: 0 to 1"):
        measure_attention(models / "lam", data, gap=GAP, layer=2)
    with pytest.raises(LaraArgumentError, match="pairs=0"):
        measure_attention(models / "lam", data, gap=GAP, pairs=0)
    with pytest.raises(DatasetError, match="no clip is longer than the frame gap of 20; the longest has 20"):
        measure_attention(models / "lam", data, gap=20)


def test_without_matplotlib_the_extra_is_named(models, data, tmp_path, monkeypatch):
    report = measure_attention(models / "lam", data, gap=GAP, pairs=1)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LaraArgumentError, match=r"need matplotlib: pip install 'lara-adapter\[viz\]'"):
        draw(report, tmp_path / "a.png")


def test_the_command(models, data, tmp_path, capsys):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    arguments = ["attention", str(models / "lam"), str(data), "--gap", "3", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--compare", str(models / "lara-lam"), "--frames", "0:2", "2:7"]) == 0
    out = capsys.readouterr().out
    assert "attention.png and attention.npz of 2 pairs 3 frames apart" in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["model", "lam", "lara-lam"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention.npz", "attention.png"]
    assert cli.main([*arguments, "--pairs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["model"] == "lam"
    assert cli.main([*arguments[:3], "--gap", "3", "--output", str(tmp_path / "out/attention.png")]) == 2
    assert "is a file, but a folder is expected" in capsys.readouterr().err
    assert cli.main([*arguments, "--frames", "7:0"]) == 2
