"""Every command that reads data takes every format by its path, and sees the same frames."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("tqdm")
pytest.importorskip("h5py")
pytest.importorskip("webdataset")
pytest.importorskip("tfrecord")
pytest.importorskip("google_crc32c")

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import formats
from helpers.videos import number_of, numbered, png, write_v21, write_v30, write_video
from test_model import small

from lara_adapter import LaraArgumentError
from lara_adapter.data import IndexSettings, build_index, find_sources, open_dataset
from lara_adapter.data.decode import read_frames
from lara_adapter.lam.attention.report import measure_attention
from lara_adapter.lam.health.report import examine
from lara_adapter.lam.label import label_dataset
from lara_adapter.lam.pretrain import PretrainSettings, pretrain_lam

LENGTHS = (12, 14, 16)


def _videos(folder: Path) -> Path:
    for video, length in enumerate(LENGTHS):
        write_video(folder / f"clip_{video}.mp4", numbered(length, video), "libx264")
    return folder


def _pictures(folder: Path) -> Path:
    for video, length in enumerate(LENGTHS):
        (folder / f"clip_{video}").mkdir(parents=True)
        for number, frame in enumerate(numbered(length, video)):
            (folder / f"clip_{video}" / f"{number}.png").write_bytes(png(frame))
    return folder


def _shard_of_videos(path: Path) -> Path:
    folder = _videos(path.parent / "loose")
    samples = [{"__key__": file.stem, "mp4": file.read_bytes()} for file in sorted(folder.iterdir())]
    return formats.write_shard(path, samples)


def _shard_of_pictures(path: Path) -> Path:
    samples = [formats.folder_samples(f"clip{video}/", video, length) for video, length in enumerate(LENGTHS)]
    return formats.write_shard(path, [sample for clip in samples for sample in clip])


def _rlds(folder: Path) -> Path:
    episodes = [formats.step_values(video, length) for video, length in enumerate(LENGTHS)]
    return formats.write_rlds(folder, {"train": [episodes[:2], episodes[2:]]})


def _with_rows(path: Path) -> Path:
    """The parquet files of a LeRobot dataset of videos."""
    info = json.loads((path / "meta/info.json").read_text())
    firsts = np.cumsum((0, *LENGTHS))
    tables = [
        pa.table(
            {
                "episode_index": [number] * length, "frame_index": range(length),
                "index": range(firsts[number], firsts[number] + length), "action": np.full(length, 0.5, np.float32),
            }
        )
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip
    whole = "file_index" in info["data_path"]
    for number, table in enumerate([pa.concat_tables(tables)] if whole else tables):
        fields = {"chunk_index": 0, "file_index": 0, "episode_chunk": 0, "episode_index": number}
        file = path / info["data_path"].format(**fields)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
    return path


FORMATS = {  # how to write it, and the camera
    "LeRobot 2.1": (lambda path: _with_rows(write_v21(path, LENGTHS)), None),
    "LeRobot 3.0": (lambda path: _with_rows(write_v30(path, LENGTHS)), None),
    "videos": (_videos, None),
    "pictures": (_pictures, None),
    "robomimic": (lambda path: formats.write_hdf5(path / "lift.hdf5", LENGTHS).parent, "agentview_image"),
    "one HDF5 file": (lambda path: formats.write_hdf5(path / "lift.hdf5", LENGTHS), "agentview_image"),
    "RLDS": (_rlds, "image"),
    "WebDataset of videos": (lambda path: _shard_of_videos(path / "shards" / "clips-000.tar").parent, None),
    "WebDataset of pictures": (lambda path: _shard_of_pictures(path / "clips-000.tar"), None),
}


@pytest.fixture(scope="module")
def lam(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "lam"
    small(vq_init_from_data=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def data(request, tmp_path_factory):
    make, camera = FORMATS[request.param]
    return make(tmp_path_factory.mktemp("data") / "set"), camera


def test_its_frames_are_read_in_order(data):
    path, camera = data
    dataset = open_dataset(path)
    camera = dataset.camera(camera)
    assert [episode.length for episode in dataset.episodes] == list(LENGTHS)
    assert [episode.number for episode in dataset.episodes] == [0, 1, 2]
    for video, (episode, frames) in enumerate(dataset.frames(camera, dataset.episodes)):
        assert [number_of(frame) for frame in frames] == [(video, number) for number in range(episode.length)]
        picked = dataset.pick(camera, episode, [3, 9, 99])
        assert {place: number_of(frame) for place, frame in picked.items()} == {3: (video, 3), 9: (video, 9)}
    assert dataset.check([camera]) == {}


def test_train_lam_finds_the_same_frames(data, tmp_path):
    path, camera = data
    sources = find_sources([path], cameras=[camera] if camera else [])
    index = build_index(sources, IndexSettings(held_out=0.0, still_keep=1.0), tmp_path / "index")
    assert (index.report["frames"], index.report["faults"]) == (sum(LENGTHS), [])
    assert index.report["pairs"] == sum(length - 5 for length in LENGTHS)
    for source in index.sources:
        frames = read_frames(source.source, source.pts, source.keys, np.array([2, 7]), 64)
        (first, then) = map(number_of, frames)
        assert then[1] - first[1] == 5


def test_every_command_takes_it(data, tmp_path, lam):
    path, camera = data
    cameras = (camera,) if camera else ()
    settings = PretrainSettings(
        videos=(path,), output=tmp_path / "run", cameras=cameras, init=str(lam), preset="tiny", steps=1, batch_size=2,
        workers=1,
    )  # fmt: skip
    assert pretrain_lam(settings).steps == 1
    report = examine(lam, path, gap=2, gaps=[2], pairs=12, camera=camera)
    assert (report.clips, report.skipped) == (3, 0)
    assert len(measure_attention(lam, path, gap=2, pairs=3, camera=camera, skip=["1"]).pairs) == 3
    done = label_dataset(path, lam, tmp_path / "labels.parquet", gap=2, camera=camera, sidecar=True, skip=["1"])
    table = pq.read_table(tmp_path / "labels.parquet")
    assert (done.episodes, table.num_rows) == (2, LENGTHS[0] + LENGTHS[2])
    assert table.column("episode_index").to_pylist() == [0] * LENGTHS[0] + [2] * LENGTHS[2]
    if not (path / "meta").is_dir():
        with pytest.raises(LaraArgumentError, match="sidecar"):
            label_dataset(path, lam, tmp_path / "copy", gap=2, camera=camera)


def test_a_folder_of_several_kinds(tmp_path):
    _videos(tmp_path / "all" / "loose")
    _shard_of_pictures(tmp_path / "all" / "clips.tar")
    formats.write_hdf5(tmp_path / "all" / "robot" / "lift.hdf5", LENGTHS)
    (tmp_path / "all" / "notes.txt").write_text("not data")
    write_video(tmp_path / "all" / "beside.mp4", numbered(12, 9), "libx264")
    _rlds(tmp_path / "all" / "rlds" / "1.0.0")
    found = find_sources([tmp_path / "all"])
    assert {source.path.suffix for source in found} >= {".mp4", ".tar", ".hdf5"}
    assert sum(".tfrecord" in source.path.name for source in found) == 2 * len(LENGTHS)
    with pytest.raises(Exception, match="name one of them"):
        open_dataset(tmp_path / "all")


@pytest.mark.parametrize(
    ("module", "extra", "kind"), [("h5py", "hdf5", "robomimic"), ("google_crc32c", "rlds", "RLDS")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, extra, kind):
    path = FORMATS[kind][0](tmp_path / "set")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Exception, match=rf"pip install 'lara-adapter\[{extra}\]'"):
        open_dataset(path)
