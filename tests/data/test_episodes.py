"""LeRobot datasets as people leave them: deleted episodes, holes, depth cameras, odd columns, damage of every kind."""

from __future__ import annotations

import json
import logging
import shutil
import tracemalloc

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import disk_datasets as disk

from lara_adapter import DatasetError, LaraArgumentError
from lara_adapter.data import IndexSettings, build_index, find_sources, open_dataset
from lara_adapter.data.decode import decode_all
from lara_adapter.data.episodes import EpisodeDataset

LENGTHS = (14, 9, 20)


def edit_info(root, change):
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info["features"])
    path.write_text(json.dumps(info))


def edit_rows(root, change, name="data/chunk-000/file-000.parquet"):
    path = root / name
    table = change(pq.read_table(path))
    pq.write_table(table, path)


def keep_listed(root, numbers):
    """Delete episodes from the metadata alone."""
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    if path.exists():
        table = pq.read_table(path)
        pq.write_table(table.filter(pa.array([n in numbers for n in table.column("episode_index").to_pylist()])), path)
        return
    path = root / "meta/episodes.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["episode_index"] in numbers]
    path.write_text("\n".join(lines) + "\n")


def frames_of(root, camera=disk.CAMERA):
    """Episode -> frames."""
    dataset = EpisodeDataset(root)
    return {episode.number: np.stack(list(frames)) for episode, frames in dataset.frames(camera, dataset.episodes)}


@pytest.mark.parametrize("groups", [True, False], ids=["a row group each", "one row group"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_episodes_that_the_metadata_no_longer_list_shift_nothing(tmp_path, kind, groups):
    root = disk.make_v3(tmp_path / "set", kind, per_file=3, groups=groups)
    whole = frames_of(root)
    keep_listed(root, {0, 2})
    left = frames_of(root)
    assert sorted(left) == [0, 2]
    assert all((left[number] == whole[number]).all() for number in left)
    dataset = EpisodeDataset(root)
    assert [len(dataset.actions(episode)) for episode in dataset.episodes] == [14, 20]
    assert (dataset.check([disk.CAMERA], rows=True), dataset.unlisted) == ({}, {1})
    # for training: no frame of the one that is not listed is in a pair
    settings = IndexSettings(held_out=0.0, still_keep=1.0)
    index = build_index(find_sources([root]), settings, tmp_path / "index")
    used = sum(int(source.train.sum()) for source in index.sources)
    assert used == (14 - 5) + (20 - 5)
    if kind == "image":
        for source in index.sources:
            number = source.source.segments[0].episode
            first = next(iter(decode_all(source.source))).frame.to_ndarray(format="rgb24")
            assert (first == whole[number][0]).all()


def test_holes_in_the_numbering_and_rows_out_of_order(tmp_path):
    root = disk.make_v2(tmp_path / "set", chunk=3)
    for place in ("data/chunk-000/episode_000001.parquet", f"videos/chunk-000/{disk.CAMERA}/episode_000001.mp4"):
        (root / place).unlink()
    keep_listed(root, {0, 2})
    dataset = open_dataset(root)
    assert [episode.number for episode in dataset.episodes] == [0, 2]
    assert (dataset.episode(1), dataset.episode(2).length) == (None, 20)
    assert (dataset.check([disk.CAMERA], rows=True), dataset.unlisted) == ({}, set())
    lines = (root / "meta/episodes.jsonl").read_text().splitlines()
    (root / "meta/episodes.jsonl").write_text("\n".join(reversed(lines)))
    assert [episode.number for episode in open_dataset(root).episodes] == [0, 2]


def spoil(root, harm):
    camera = f"videos/chunk-000/{disk.CAMERA}/episode_000001.mp4"
    if harm == "missing video":
        (root / camera).unlink()
    elif harm == "no video":
        (root / camera).write_bytes(b"nothing")
    elif harm == "pointer":
        (root / camera).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif harm == "short video":
        disk.write_video(root / camera, disk.scene(1, 5)[0])
    elif harm == "missing parquet":
        (root / "data/chunk-000/episode_000001.parquet").unlink()
    elif harm == "torn parquet":
        path = root / "data/chunk-000/episode_000001.parquet"
        path.write_bytes(path.read_bytes()[:200])
    elif harm == "missing row":
        edit_rows(root, lambda table: table.slice(1), "data/chunk-000/episode_000001.parquet")
    elif harm == "no index":
        edit_rows(root, lambda table: table.drop(["frame_index"]), "data/chunk-000/episode_000001.parquet")


HARMS = {
    "missing video": "cannot be opened", "no video": "cannot be opened", "pointer": "git lfs pull",
    "short video": "ends after 0.500 s, but it needs frames up to 0.900 s", "missing parquet": "episode_000001",
    "torn parquet": "episode_000001", "missing row": "does not hold its frames 0 to 8 in order", "no index": "frame_index",
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_found_before_the_work_and_costs_one_episode(tmp_path, harm, caplog):
    root = disk.make_v2(tmp_path / "set", chunk=3)
    spoil(root, harm)
    dataset = open_dataset(root)
    with caplog.at_level(logging.WARNING):
        dataset.leave_out(dataset.check([disk.CAMERA], rows=True))
    assert [episode.number for episode in dataset.episodes] == [0, 2]
    assert (list(dataset.left_out), dataset.total_frames) == ([1], 34)
    (record,) = caplog.records
    assert "set: 1 of 3 episodes is damaged and left out: 1 (episode 1: " in record.getMessage()
    assert HARMS[harm] in record.getMessage()


def test_of_a_file_with_several_episodes_the_short_ones_alone_are_damaged(tmp_path):
    root = disk.make_v3(tmp_path / "set", per_file=3)
    disk.write_video(root / f"videos/{disk.CAMERA}/chunk-000/file-000.mp4", disk.scene(0, 25)[0])
    assert list(EpisodeDataset(root).check([disk.CAMERA])) == [2]


def test_nothing_left_is_an_error(tmp_path):
    root = disk.make_v2(tmp_path / "set", chunk=3)
    shutil.rmtree(root / "videos")
    dataset = open_dataset(root)
    with pytest.raises(DatasetError, match=r"set: every episode is damaged: episode 0: .* cannot be opened"):
        dataset.leave_out(dataset.check([disk.CAMERA]))


def test_episodes_are_chosen_by_number(tmp_path):
    root = disk.make_v2(tmp_path / "set", lengths=(6, 7, 8, 9, 10), chunk=5)

    def numbers(**options):
        return [episode.number for episode in open_dataset(root, **options).episodes]

    assert numbers(episodes=["1:4"], skip=["2"]) == [1, 3]
    assert numbers(episodes=["4", ":2"]) == [0, 1, 4]
    assert numbers(skip=["3:"]) == [0, 1, 2]
    for wrong, message in (
        ({"episodes": ["5"]}, "names none of the episodes 0 to 4"), ({"skip": ["x"]}, 'a number ("7") or a range'),
        ({"skip": [":"]}, "no episode of set is left"), ({"episodes": ["1:2:3"]}, "or a range"),
    ):  # fmt: skip
        with pytest.raises(LaraArgumentError, match=message.replace("(", r"\(").replace(")", r"\)")):
            numbers(**wrong)
    sources = find_sources([root], episodes=["1", "3"])
    assert [source.segments[0].episode for source in sources] == [1, 3]
    with pytest.raises(LaraArgumentError, match="episodes and skip number the episodes of one dataset, but 2"):
        find_sources([root, disk.make_v2(tmp_path / "other")], skip=["1"])


DEPTH = {
    "said by info": {"info": {"is_depth_map": True}},
    "said as LeRobot 0.3 did": {"info": {"video.is_depth_map": True}},
    "said by video_info": {"video_info": {"video.is_depth_map": True}},
    "12 bits": {"info": {"video.pix_fmt": "gray12le"}},
}


@pytest.mark.parametrize("how", [*DEPTH, "name"])
def test_depth_maps_are_left_out_and_said(tmp_path, how, caplog):
    other = "observation.images.top_depth" if how == "name" else disk.WRIST
    root = disk.make_v2(tmp_path / "set", cameras=(disk.CAMERA, other))
    edit_info(root, lambda features: features[other].update(DEPTH.get(how, {})))
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(root)
    assert (dataset.cameras, dataset.depth) == ((disk.CAMERA,), (other,))
    assert f"left out, because they are depth maps: {other}" in caplog.text
    assert dataset.camera(None) == disk.CAMERA
    assert {source.column for source in find_sources([root])} == {disk.CAMERA}
    with pytest.raises(LaraArgumentError, match=f"has {disk.CAMERA} .and the depth maps {other}, which are not used"):
        dataset.camera(other)


def test_names_that_only_look_like_depth_are_cameras(tmp_path):
    root = disk.make_v2(tmp_path / "set", cameras=("observation.images.indepth", "observation.images.top"))
    assert len(open_dataset(root).cameras) == 2


def test_columns_of_any_type(tmp_path):
    root = disk.make_v3(tmp_path / "set", per_file=3)
    rows = sum(LENGTHS)
    odd = {
        "language": pa.array(["pick"] * rows), "nested": pa.array([[[1.0, 2.0], [3.0, 4.0]]] * rows),
        "struct": pa.array([{"a": 1, "b": "x"}] * rows), "empty": pa.nulls(rows), "bytes": pa.array([b"\x00"] * rows),
        "category": pa.array(["a"] * rows).dictionary_encode(), "flag": pa.array([True] * rows),
        "time": pa.array([0] * rows, pa.timestamp("ns")), "half": pa.array(np.zeros(rows, np.float16)),
    }  # fmt: skip

    def widen(table):
        for name, column in odd.items():
            table = table.append_column(name, column)
        return table

    edit_rows(root, widen)
    edit_info(root, lambda features: features.update({name: {"dtype": "odd", "shape": None} for name in odd}))
    dataset = open_dataset(root)
    assert dataset.check([disk.CAMERA], rows=True) == {}
    found = dataset.rows(dataset.episodes[1], list(odd))
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(odd, 9)
    assert found["nested"].shape == (9, 2, 2)


@pytest.mark.parametrize("kind", ["int8", "bool", "float64", "text", "ragged"])
def test_actions_of_any_type(tmp_path, kind):
    root = disk.make_v3(tmp_path / "set", per_file=3)
    rows = sum(LENGTHS)
    values = {
        "int8": pa.array([[1, 2]] * rows, pa.list_(pa.int8())), "bool": pa.array([True] * rows),
        "float64": pa.array([[0.5, float("nan")]] * rows), "text": pa.array(["left"] * rows),
        "ragged": pa.array([[1.0]] * (rows - 1) + [[1.0, 2.0]]),
    }[kind]  # fmt: skip
    edit_rows(root, lambda table: table.set_column(table.column_names.index("action"), "action", values))
    dataset = open_dataset(root)
    episode = dataset.episodes[2]
    if kind == "text":
        assert dataset.actions(episode) is None
    elif kind == "ragged":
        with pytest.raises(DatasetError, match=r"episode 2, column action"):
            dataset.actions(episode)
    else:
        actions = dataset.actions(episode)
        assert (actions.dtype, actions.shape) == (np.float64, (20, 1 if kind == "bool" else 2))


def test_a_damaged_row_of_the_metadata_is_one_clear_error(tmp_path):
    root = disk.make_v2(tmp_path / "set")
    path = root / "meta/episodes.jsonl"
    path.write_text(path.read_text() + "{half a line\n")
    with pytest.raises(DatasetError, match=r"episodes\.jsonl, line 4"):
        open_dataset(root)


def test_an_episode_listed_twice_or_without_frames_is_left_out(tmp_path, caplog):
    root = disk.make_v2(tmp_path / "set")
    path = root / "meta/episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1], json.dumps({"episode_index": 7, "length": 0})]))
    with caplog.at_level(logging.WARNING):
        assert [episode.number for episode in open_dataset(root).episodes] == [0, 2]
    assert "the metadata list it more than once" in caplog.text
    assert "it has no frames" in caplog.text


def test_a_hundred_thousand_episodes_are_held_in_a_few_megabytes(tmp_path):
    root, count = disk.make_v3(tmp_path / "set"), 100_000
    table = {
        "episode_index": np.arange(count), "length": np.full(count, 300), "data/chunk_index": np.zeros(count, int),
        "data/file_index": np.arange(count) // 100, f"videos/{disk.CAMERA}/chunk_index": np.zeros(count, int),
        f"videos/{disk.CAMERA}/file_index": np.arange(count) // 100,
        f"videos/{disk.CAMERA}/from_timestamp": np.arange(count) % 100 * 30.0,
    }  # fmt: skip
    pq.write_table(pa.table(table), root / "meta/episodes/chunk-000/file-000.parquet")
    EpisodeDataset(root)  # what the imports take does not count
    tracemalloc.start()
    dataset = EpisodeDataset(root)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.total_frames == 30_000_000
    assert dataset.episode(99_999).videos[disk.CAMERA][1] == 99 * 30.0
    assert held < 10e6
