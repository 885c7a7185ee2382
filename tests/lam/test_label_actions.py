"""`lara label --actions`: a decoder fitted on demonstrations, how good it says it is, and what is written."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import pyarrow.parquet as pq
from helpers import disk_datasets as disk
from test_model import save_distinct

from lara_adapter import LaraArgumentError, LatentActionModel, cli
from lara_adapter.data.gap import Gap
from lara_adapter.lam.label import label_dataset
from lara_adapter.lam.label.decoder import Decoder, Demonstration, fit_decoder
from lara_adapter.lam.label.regression import Kernel
from lara_adapter.lam.pretrain.labelled import read_labelled

GAP = 4


def demonstrations(count: int, noise: float, length: int = 60) -> list[Demonstration]:
    """z is a linear map of the actions of the gap, and noise."""
    g = torch.Generator().manual_seed(0)
    code = torch.randn(GAP * 2, 16, generator=g)
    made = []
    for _ in range(count):
        actions = torch.randn(length, 2, generator=g)
        valid = torch.arange(length) + GAP < length
        chunks = torch.stack([actions[(torch.arange(length) + k).clamp_max(length - 1)] for k in range(GAP)], 1)
        latent = chunks.flatten(1) @ code
        made.append(Demonstration(latent + noise * torch.randn(latent.shape, generator=g), valid, actions))
    return made


def test_a_decoder_finds_the_actions_that_z_holds():
    fitted = fit_decoder(demonstrations(6, 0.01), GAP, 0.5)
    assert fitted.quality["r2"] > 0.99
    low, high = fitted.quality["r2_interval"]
    assert low <= fitted.quality["r2"] <= high
    assert (fitted.quality["episodes"], fitted.quality["frames"]) == (6, 360)
    latent, valid, actions = demonstrations(7, 0.0)[-1]  # not among the six
    decoded = fitted.decoder.decode(latent, valid)
    assert decoded.dtype == torch.float32
    inside = (actions > fitted.decoder.low) & (actions < fitted.decoder.high)
    inside[-1] = False  # no pair covers the last frame; it repeats the one before
    assert (decoded - actions)[inside].abs().max() < 0.15
    assert torch.equal(decoded[-1], decoded[-2])
    json.dumps(fitted.quality, allow_nan=False)


def test_what_is_said_of_a_decoder_is_what_it_does_on_others():
    """R2 by cross-validation against R2 on demonstrations made afresh."""
    many = demonstrations(30, 8.0, length=40)
    fitted = fit_decoder(many[:10], GAP, -1.0)
    errors = [(fitted.decoder.decode(z, valid)[:-1] - a[:-1]).square().sum() for z, valid, a in many[10:]]
    spreads = [(a[:-1] - torch.cat([each.actions for each in many[:10]]).mean(0)).square().sum() for *_, a in many[10:]]
    r2 = float(1 - sum(errors) / sum(spreads))
    assert 0.2 < r2 < 0.9
    assert fitted.quality["r2"] == pytest.approx(r2, abs=0.08)


def test_refusals_of_a_decoder():
    good = demonstrations(4, 0.1)
    with pytest.raises(LaraArgumentError, match="2 demonstrations are longer than the gap"):
        fit_decoder([*good[:2], *(each._replace(valid=torch.zeros_like(each.valid)) for each in good[2:])], GAP, 0.5)
    with pytest.raises(LaraArgumentError, match="never change"):
        fit_decoder([each._replace(actions=torch.ones_like(each.actions)) for each in good], GAP, 0.5)
    random = [each._replace(latent=torch.randn(each.latent.shape)) for each in good]
    with pytest.raises(LaraArgumentError, match=r"left out of its fit is -?0\.\d\d .* at least 0\.5 is expected"):
        fit_decoder(random, GAP, 0.5)


def test_an_episode_shorter_than_the_gap_has_no_actions():
    decoder = Decoder(demonstrations(3, 0.1), GAP, Kernel(1.0, 1.0))
    assert torch.equal(decoder.decode(torch.zeros(3, 16), torch.zeros(3, dtype=torch.bool)), torch.zeros(3, 2))


# ---------------------------------------------------------------------- on datasets


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    return save_distinct(tmp_path_factory.mktemp("models") / "lam")


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return disk.make_v3(tmp_path_factory.mktemp("known") / "demonstrations", lengths=(14, 16, 20, 12))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A dataset without actions."""
    folder = disk.make_v2(tmp_path_factory.mktemp("video") / "video")
    for path in (folder / "data").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    info = json.loads((folder / "meta/info.json").read_text())
    del info["features"]["action"]
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def columns(folder, name):
    rows = [
        row for path in sorted((folder / "data").rglob("*.parquet")) for row in pq.read_table(path)[name].to_pylist()
    ]
    return torch.tensor(rows)


def test_a_copy_gets_actions_and_says_how_good_they_are(lam, known, video, tmp_path):
    options = {"gap": GAP, "actions": known, "least_r2": -100.0, "batch_size": 8}
    report = label_dataset(video, lam, tmp_path / "labelled", **options)
    assert report.features[-1] == "action"
    assert report.actions["episodes"] == 4
    provenance = json.loads((tmp_path / "labelled/meta/lara.json").read_text())
    assert provenance["actions_from"]["name"] == "demonstrations"
    assert provenance["result"]["actions"] == report.actions
    info = json.loads((tmp_path / "labelled/meta/info.json").read_text())["features"]["action"]
    assert (info["dtype"], info["shape"]) == ("float32", [2])
    actions, true = columns(tmp_path / "labelled", "action"), columns(known, "action")
    assert actions.shape == (sum(disk.LENGTHS), 2)
    assert actions.std() > 0
    assert (actions >= true.amin(0)).all()
    assert (actions <= true.amax(0)).all()
    # the same call has nothing to do, and says the same
    assert label_dataset(video, lam, tmp_path / "labelled", **options) == report._replace(resumed=report.episodes)
    # shards and a merge write the same
    for shard in ("0/2", "1/2"):
        label_dataset(video, lam, tmp_path / "merged", shard=shard, **options)
    label_dataset(video, lam, tmp_path / "merged", merge=True, **options)
    assert torch.equal(columns(tmp_path / "merged", "action"), actions)


def test_video_without_a_state_gets_the_mean_of_the_demonstrations(lam, known, video, tmp_path, caplog):
    """So that one dataset can be made of both; it says nothing, and so hides the state."""
    stated = shutil.copytree(known, tmp_path / "stated")
    info = json.loads((stated / "meta/info.json").read_text())
    info["features"]["observation.state"] = {"dtype": "float64", "shape": [3], "names": ["x", "y", "z"]}
    (stated / "meta/info.json").write_text(json.dumps(info))
    rows = []
    for path in sorted((stated / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        states = torch.randn(table.num_rows, 3, generator=torch.Generator().manual_seed(len(rows))).double()
        rows.append(states)
        pq.write_table(table.append_column("observation.state", [states.tolist()]), path)
    report = label_dataset(video, lam, tmp_path / "labelled", gap=GAP, actions=stated, least_r2=-100.0)
    assert report.features[-2:] == ("action", "observation.state")
    assert "video has no observation.state: it gets the mean of the demonstrations'" in caplog.text
    mean = torch.cat(rows).mean(0).float()
    found = columns(tmp_path / "labelled", "observation.state")
    assert torch.equal(found, mean.expand_as(found))
    feature = json.loads((tmp_path / "labelled/meta/info.json").read_text())["features"]["observation.state"]
    assert feature == {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    assert read_episodes_stats(tmp_path / "labelled")["observation.state"]["std"] == [0, 0, 0]
    # a sidecar has no use for it
    options = {"gap": GAP, "actions": stated, "least_r2": -100.0, "sidecar": True}
    assert label_dataset(video, lam, tmp_path / "labels.parquet", **options).features[-1] == "action"


def read_episodes_stats(folder):
    return json.loads((folder / "meta/episodes_stats.jsonl").read_text().splitlines()[0])["stats"]


def test_a_dataset_that_has_actions_keeps_them(lam, known, tmp_path):
    report = label_dataset(known, lam, tmp_path / "labelled", gap=GAP, actions=known, least_r2=-100.0)
    assert report.features[-1] == "lara.action"
    assert torch.equal(columns(tmp_path / "labelled", "action"), columns(known, "action"))


def test_the_sidecar_has_them_too(lam, known, video, tmp_path, capsys):
    command = ["label", str(video), "--lam", str(lam), "--gap", str(GAP), "--actions", str(known), "--least-r2", "-100"]
    assert cli.main([*command, "--sidecar", "--output", str(tmp_path / "labels.parquet")]) == 0
    assert "actions: R2 " in capsys.readouterr().out
    table = pq.read_table(tmp_path / "labels.parquet")
    assert table.num_rows == sum(disk.LENGTHS)
    assert torch.tensor(table["action"].to_pylist()).shape == (table.num_rows, 2)


def test_refusals(lam, known, video, tmp_path):
    with pytest.raises(LaraArgumentError, match="lower least_r2"):
        label_dataset(video, lam, tmp_path / "a", gap=GAP, actions=known, least_r2=0.999)
    assert not (tmp_path / "a").exists()
    with pytest.raises(LaraArgumentError, match="with a column 'action'"):
        label_dataset(video, lam, tmp_path / "a", gap=GAP, actions=video)
    slow = shutil.copytree(known, tmp_path / "slow")
    info = json.loads((slow / "meta/info.json").read_text())
    (slow / "meta/info.json").write_text(json.dumps({**info, "fps": 5}))
    with pytest.raises(LaraArgumentError, match="5 frames per second, but video has 10"):
        label_dataset(video, lam, tmp_path / "a", gap=GAP, actions=slow)


def test_a_lam_that_learnt_from_the_demonstrations_is_named(lam, known, video, tmp_path, caplog):
    """Its z of them is better than of anything else, and so is the decoder."""
    labels = read_labelled(known, Gap(frames=GAP), (), 16, seed=0)
    model = LatentActionModel.from_pretrained(lam)
    model.config = dataclasses.replace(model.config, labelled_by=labels.fingerprint)
    model.save_pretrained(tmp_path / "lam")
    options = {"gap": GAP, "actions": known, "least_r2": -100.0, "batch_size": 8}
    report = label_dataset(video, tmp_path / "lam", tmp_path / "labelled", **options)
    assert report.actions["seen_by_lam"] is True
    assert "learnt from the actions of demonstrations: the decoder's R2 of" in caplog.text
    caplog.clear()
    other = disk.make_v3(tmp_path / "other", lengths=(14, 16, 21))
    report = label_dataset(video, tmp_path / "lam", tmp_path / "again", **{**options, "actions": other})
    assert "seen_by_lam" not in report.actions
    assert "flatters" not in caplog.text
