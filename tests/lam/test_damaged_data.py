"""One meaning of damage for all that read video: what is damaged is left out by name, and the others will do."""

from __future__ import annotations

import json
import logging

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("tqdm")

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import disk_datasets as disk
from test_model import small

from lara_adapter import DatasetError
from lara_adapter.lam.attention.report import measure_attention
from lara_adapter.lam.health.report import examine
from lara_adapter.lam.label import label_dataset
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam

LENGTHS = (14, 9, 20)
READERS = {
    "train-lam": lambda lam, data, out: pretrain_lam(
        PretrainSettings(videos=(data,), output=out, init=str(lam), preset="tiny", steps=1, batch_size=2, workers=1)
    ),
    "label": lambda lam, data, out: label_dataset(data, lam, out, gap=2, sidecar=True),
    "health": lambda lam, data, out: examine(lam, data, gap=2, gaps=[2], pairs=12),
    "attention": lambda lam, data, out: measure_attention(lam, data, gap=2, pairs=12),
}


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "lam"
    small(vq_init_from_data=True).save_pretrained(folder)
    return folder


def shorten(root):
    disk.write_video(root / f"videos/chunk-000/{disk.CAMERA}/episode_000001.mp4", disk.scene(1, 5)[0])


def remove(root):
    (root / f"videos/chunk-000/{disk.CAMERA}/episode_000001.mp4").unlink()


def spoil_a_picture(root):
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    cells = table.column(disk.CAMERA).to_pylist()
    cells[LENGTHS[0] + 3]["bytes"] = b"not a picture"
    place = table.column_names.index(disk.CAMERA)
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(cells, field.type)), path)


HARMS = {
    "a video that ends early": (lambda root: disk.make_v2(root, chunk=3), shorten),
    "a video that is missing": (lambda root: disk.make_v2(root, chunk=3), remove),
    "a picture": (lambda root: disk.make_v3(root, "image"), spoil_a_picture),
}


@pytest.mark.parametrize("index", ["whole", "ahead"])
@pytest.mark.parametrize("harm", HARMS)
def test_train_lam_leaves_out_a_damaged_episode_by_name(tmp_path, lam, harm, index, caplog):
    make, spoil = HARMS[harm]
    spoil(make(tmp_path / "squares"))
    settings = PretrainSettings(
        videos=(tmp_path / "squares",), output=tmp_path / "out", init=str(lam), preset="tiny", steps=6, batch_size=2,
        workers=1, gap="2", held_out=0.0, cut_threshold=0.0, still_threshold=0.0, index=index,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        pretrain_lam(settings)
    assert caplog.text.count("episode 1 is damaged: ") == 1
    report = json.loads((tmp_path / "out" / "videos.json").read_text())
    (fault,) = report["faults"]
    assert fault["what"].startswith("episode 1 is damaged: ")
    assert fault["used"] == "left out"
    assert report["pairs"] == LENGTHS[0] + LENGTHS[2] - 4


@pytest.mark.parametrize("index", ["whole", "ahead"])
def test_train_lam_refuses_a_dataset_of_which_nothing_is_left(tmp_path, lam, index):
    root = disk.make_v2(tmp_path / "squares", chunk=3)
    for path in root.rglob("*.mp4"):
        path.write_bytes(b"no video")
    settings = PretrainSettings(
        videos=(root,), output=tmp_path / "out", init=str(lam), preset="tiny", steps=1, workers=1, index=index
    )
    with pytest.raises(DatasetError, match=r"no usable video among 3 sources .*episode \d is damaged: "):
        pretrain_lam(settings)


@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"train-lam"}))
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_episode_of_a_dataset_is_left_out_by_name(tmp_path, lam, reader, harm, caplog):
    make, spoil = HARMS[harm]
    spoil(make(tmp_path / "squares"))
    READERS[reader](lam, tmp_path / "squares", tmp_path / "out.parquet")
    assert "1 of 3 episodes is damaged and left out: 1 (episode 1: " in caplog.text


@pytest.mark.parametrize("reader", READERS)
def test_of_a_folder_of_videos_a_damaged_one_is_left_out_by_name(tmp_path, lam, reader, caplog):
    for number in range(3):
        disk.write_video(tmp_path / f"videos/{number}.mp4", disk.scene(number, 40)[0])
    (tmp_path / "videos/torn.mp4").write_bytes(b"no video")
    with caplog.at_level(logging.WARNING):
        READERS[reader](lam, tmp_path / "videos", tmp_path / "out.parquet")
    assert "torn.mp4" in caplog.text
