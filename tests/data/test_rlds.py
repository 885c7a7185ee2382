"""RLDS datasets: found without TensorFlow, read piece by piece, damage named by episode."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("google_crc32c")
pytest.importorskip("tfrecord")
pytest.importorskip("av")

from helpers.formats import STEP, TEXT, counted, numbers_of, step_values, tensor, write_rlds, write_with_tensorflow
from tfrecord import example_pb2

from lara_adapter import DatasetError
from lara_adapter.data import tfrecord
from lara_adapter.data.rlds import RldsDataset

SHARD = "toy-train.tfrecord-00000-of-00001"


def whole(folder, lengths=(4, 6, 3)):
    return write_rlds(folder, {"train": [[step_values(video, length) for video, length in enumerate(lengths)]]})


def actions(video, length):
    steps = np.arange(length)
    columns = [steps % 2, steps * 0, steps * 0 - 1, steps + 300, steps * 0 + video, steps, steps * 0 - 0.5]
    return np.stack(columns, axis=1).astype(np.float32)


def record_at(path, number):
    with tfrecord.open_records(path) as file:
        return list(tfrecord.records(file))[number]


def overwrite(path, position, content):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_splits_and_shards_are_numbered_in_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    episodes = [step_values(video, 3 + video) for video in range(5)]
    write_rlds(tmp_path / "toy" / "1.0.0", {"train": [episodes[:1], episodes[1:3]], "val": [episodes[3:]]})
    dataset = RldsDataset(tmp_path / "toy")
    assert dataset.name == "toy/1.0.0"
    assert dataset.cameras == ("image", "wrist_image")
    assert dataset.depth == ("depth",)
    assert [episode.length for episode in dataset.episodes] == [3, 4, 5, 6, 7]
    assert dataset.episode(2).name == "record 1 of toy-train.tfrecord-00001-of-00002"
    for episode in dataset.episodes:
        assert numbers_of(dataset, "image", episode) == counted(episode.number, episode.length)
        assert numbers_of(dataset, "wrist_image", episode) == counted(episode.number + 8, episode.length)
        assert np.array_equal(dataset.actions(episode), actions(episode.number, episode.length))
    assert dataset.check(dataset.cameras, rows=True) == {}
    assert dataset.fps == 10
    assert "10 frames per second are assumed" in caplog.text
    assert RldsDataset(tmp_path / "toy", fps=5).fps == 5
    sources = list(dataset.sources("image"))
    assert [source.segments[0].length for source in sources] == [3, 4, 5, 6, 7]
    one = RldsDataset(tmp_path / "toy" / "1.0.0" / "toy-val.tfrecord-00000-of-00001")
    assert numbers_of(one, "image") == counted(3, 6) + counted(4, 7)


def test_some_frames_are_read_without_the_others(tmp_path, monkeypatch):
    dataset = RldsDataset(whole(tmp_path, [40]))
    episode = dataset.episodes[0]
    frames = [frame for _, frames in dataset.frames("wrist_image", [episode]) for frame in frames]
    read, opened = [], tfrecord.open_records

    def count_bytes(path):
        file = opened(path)
        read.append(file)
        return file

    monkeypatch.setattr("lara_adapter.data.rlds.open_records", count_bytes)
    monkeypatch.setattr(
        tfrecord,
        "_read",
        lambda file, start, stop, plain=tfrecord._read: read.append(stop - start) or plain(file, start, stop),
    )
    some = dataset.pick("wrist_image", episode, [31, 7, 8, 99])
    assert list(some) == [7, 8, 31]
    assert all((frame == frames[place]).all() for place, frame in some.items())
    assert len(read) == 4  # one file, three pictures


def test_a_dataset_as_tensorflow_writes_it(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorflow_datasets")):
        pytest.skip("tensorflow and tensorflow-datasets are not installed")
    dataset = RldsDataset(write_with_tensorflow(tmp_path, [4, 6, 3]))
    assert dataset.cameras == ("image", "wrist_image")
    assert sorted(episode.length for episode in dataset.episodes) == [3, 4, 6]  # tensorflow-datasets shuffles
    for episode in dataset.episodes:
        values = dataset.actions(episode)
        video = int(values[0, 6])
        assert np.array_equal(values[:, [0, 3, 4, 5, 6, 7, 8]], actions(video, episode.length))
        assert np.allclose(values[:, 1:3], [[step, 0.1] for step in range(episode.length)])
        assert numbers_of(dataset, "image", episode) == counted(video, episode.length)
        assert numbers_of(dataset, "wrist_image", episode) == counted(video + 8, episode.length)
    assert dataset.check(dataset.cameras, rows=True) == {}


@pytest.mark.parametrize("values", [[0, 1, 127, 128, -1, 2**62, -(2**63), 300], [5], []])
def test_integers_of_any_size(tmp_path, values):
    episode = {"steps/x": (values, "int"), "steps/y": ([b"", b"\0a\0"], "byte"), "steps/z": ([], "float")}
    path = write_rlds(tmp_path, {"train": [[episode]]}) / SHARD
    with tfrecord.open_records(path) as file:
        found = dict(tfrecord.features(file, next(iter(tfrecord.records(file)))))
        assert tfrecord.numbers(file, found["steps/x"]).tolist() == values
        assert tfrecord.count(file, found["steps/x"]) == len(values)
        assert list(tfrecord.byte_strings(file, found["steps/y"])) == [b"", b"\0a\0"]
        assert list(tfrecord.byte_strings(file, found["steps/y"], [1])) == [b"\0a\0"]
        assert len(tfrecord.numbers(file, found["steps/z"])) == 0


def test_it_agrees_with_protocol_buffers(tmp_path):
    path = whole(tmp_path) / SHARD
    with tfrecord.open_records(path) as file:
        for record in tfrecord.records(file):
            content = path.read_bytes()[record.start : record.start + record.size]
            known = example_pb2.Example.FromString(content).features.feature
            found = dict(tfrecord.features(file, record))
            assert found.keys() == known.keys()
            for name, feature in found.items():
                values = getattr(known[name], known[name].WhichOneof("kind")).value
                read = tfrecord.byte_strings(file, feature) if feature.tag == 0x0A else tfrecord.numbers(file, feature)
                assert list(read) == list(values)


def test_an_action_without_parts_and_none_at_all(tmp_path):
    episode = step_values(0, 3)
    one = {"observation": STEP["observation"], "action": tensor("float32", 2), "action_note": TEXT}
    episode["steps/action"] = ([0.5 * place for place in range(6)], "float")
    dataset = RldsDataset(write_rlds(tmp_path / "one", {"train": [[episode]]}, one))
    assert dataset.actions(dataset.episodes[0]).tolist() == [[0, 0.5], [1, 1.5], [2, 2.5]]
    none = {"observation": {"image": STEP["observation"]["image"]}, "action": TEXT}
    dataset = RldsDataset(write_rlds(tmp_path / "none", {"train": [[step_values(0, 3)]]}, none))
    assert dataset.actions(dataset.episodes[0]) is None
    assert dataset.episodes[0].length == 3  # counted by its pictures
    assert dataset.check(["image"], rows=True) == {}


def test_wrong_counts_are_found_before_the_work(tmp_path, caplog):
    episodes = [step_values(video, 4) for video in range(6)]
    episodes[0]["steps/observation/image"][0].pop()
    del episodes[1]["steps/observation/image"]
    episodes[2]["steps/action/gripper"][0].pop()
    del episodes[3]["steps/action/gripper"]
    episodes[4] = {name: ([], kind) for name, (_, kind) in episodes[4].items()}
    step = {"a_first": tensor("bool"), **STEP}
    for episode in episodes:
        episode["steps/a_first"] = ([1] * len(episode["steps/is_first"][0]), "int")
    dataset = RldsDataset(write_rlds(tmp_path, {"train": [episodes]}, step))
    assert dataset.left_out[4].endswith("record 4: it has no steps")
    assert SHARD in caplog.text
    damaged = dataset.check(["image"], rows=True)
    assert sorted(damaged) == [0, 1, 2, 3]
    assert damaged[0] == f"record 0 of {SHARD}: steps/observation/image has 3 entries, but there are 4 steps"
    assert damaged[1] == f"record 1 of {SHARD}: steps/observation/image is missing"
    assert "steps/action/gripper has 3 entries" in damaged[2]
    assert dataset.check(["wrist_image"]) == {}
    with pytest.raises(DatasetError, match=rf"{SHARD}: episode 0 \(record 0\) is damaged: frame 0: .* has 3 entries"):
        numbers_of(dataset, "image", dataset.episodes[0])
    with pytest.raises(DatasetError, match="gripper is missing"):
        dataset.actions(dataset.episode(3))
    dataset.leave_out(damaged)
    assert numbers_of(dataset, "image") == counted(5, 4)


def test_a_truncated_shard_costs_only_what_it_lacks(tmp_path):
    episodes = [step_values(video, 4) for video in range(5)]
    write_rlds(tmp_path, {"train": [episodes[:3], episodes[3:]]})
    path = tmp_path / "toy-train.tfrecord-00000-of-00002"
    path.write_bytes(path.read_bytes()[: record_at(path, 1).start + 50])
    dataset = RldsDataset(tmp_path)
    assert sorted(dataset.left_out) == [1, 2]
    assert "is truncated" in dataset.left_out[1]
    assert numbers_of(dataset, "image") == counted(0, 4) + counted(3, 4) + counted(4, 4)
    assert dataset.episodes[1].number == 3  # the numbers do not depend on the damage


def test_missing_shards_and_missing_records_keep_the_numbers(tmp_path):
    episodes = [step_values(video, 4) for video in range(4)]
    write_rlds(tmp_path, {"train": [episodes[:1], episodes[1:3], episodes[3:]]})
    path = tmp_path / "toy-train.tfrecord-00001-of-00003"
    path.write_bytes(path.read_bytes()[: record_at(path, 1).start - 12])
    (tmp_path / "toy-train.tfrecord-00000-of-00003").unlink()
    dataset = RldsDataset(tmp_path)
    assert "is missing" in dataset.left_out[0]
    assert dataset.left_out[2].endswith("holds 1 of 2 episodes")
    assert numbers_of(dataset, "image") == counted(1, 4) + counted(3, 4)


def test_checksums(tmp_path):
    path = whole(tmp_path) / SHARD
    record = record_at(path, 1)
    with tfrecord.open_records(path) as file:
        pictures = dict(tfrecord.features(file, record))["steps/observation/image"]
    overwrite(path, pictures.stop - 40, b"!!!!")
    dataset = RldsDataset(tmp_path)
    assert dataset.left_out == {}  # the contents are not read yet
    with pytest.raises(
        DatasetError, match=rf"{SHARD}: episode 1 \(record 1\) is damaged: frame 0: .*checksum is wrong"
    ):
        numbers_of(dataset, "image", dataset.episodes[1])
    with pytest.raises(DatasetError, match="checksum is wrong"):
        dataset.actions(dataset.episodes[1])
    assert numbers_of(dataset, "image", dataset.episodes[2]) == counted(2, 3)
    overwrite(path, record.start - 12, struct.pack("<Q", 7))
    dataset = RldsDataset(tmp_path)
    assert sorted(dataset.left_out) == [1, 2]
    assert "the checksum of its length is wrong" in dataset.left_out[1]


def test_a_damaged_picture_is_named_with_its_frame(tmp_path):
    episode = step_values(0, 4)
    episode["steps/observation/image"][0][2] = b"no picture"
    dataset = RldsDataset(write_rlds(tmp_path, {"train": [[episode]]}))
    with pytest.raises(
        DatasetError, match=rf"{SHARD}: episode 0 \(record 0\) is damaged: frame 2 of image is not a picture"
    ):
        numbers_of(dataset, "image")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x0a", b"\xff" * 40, b"\x0a\x05\x0a\x03\x0a\x01x", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"],
)
def test_a_record_that_is_no_example(tmp_path, content):
    import google_crc32c

    def masked(part):
        return struct.pack("<I", tfrecord._masked(google_crc32c.value(part)))

    path = whole(tmp_path, [3, 3]) / SHARD
    length = struct.pack("<Q", len(content))
    path.write_bytes(length + masked(length) + content + masked(content) + path.read_bytes())
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["3"]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    dataset = RldsDataset(tmp_path)
    assert sorted(dataset.left_out) == [0]
    assert f"{SHARD}: record 0: " in dataset.left_out[0]
    assert numbers_of(dataset, "image") == counted(0, 3) + counted(1, 3)


def test_what_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"it has no features\.json"):
        RldsDataset(tmp_path)
    folder = whole(tmp_path / "a")
    (folder / "features.json").write_text("{")
    with pytest.raises(DatasetError, match=r"features\.json is damaged"):
        RldsDataset(folder)
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"label": {"text": {}}}}}))
    with pytest.raises(DatasetError, match="has no steps, but label"):
        RldsDataset(folder)
    folder = write_rlds(tmp_path / "b", {"train": [[step_values(0, 3)]]}, {"action": tensor("float32", 2)})
    with pytest.raises(DatasetError, match="steps have no image"):
        RldsDataset(folder)
    folder = whole(tmp_path / "c")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    with pytest.raises(DatasetError, match="is stored as array_record"):
        RldsDataset(folder)
    info["splits"][0]["filepathTemplate"] = "../{DATASET}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="outside of the dataset"):
        RldsDataset(folder)
    (folder / "dataset_info.json").unlink()
    assert RldsDataset(folder).total_frames == 13  # by the files alone
    (folder / SHARD).unlink()
    with pytest.raises(DatasetError, match="holds no episode"):
        RldsDataset(folder)


def test_what_is_recognised(tmp_path):
    folder = whole(tmp_path / "toy" / "1.0.0")
    assert RldsDataset.recognises(folder)
    assert RldsDataset.recognises(tmp_path / "toy")
    assert RldsDataset.recognises(folder / SHARD)
    assert not RldsDataset.recognises(tmp_path)
    assert not RldsDataset.recognises(folder / "features.json")
    whole(tmp_path / "toy" / "1.10.0", [9])
    whole(tmp_path / "toy" / "1.9.0", [9])
    assert RldsDataset(tmp_path / "toy").name == "toy/1.10.0"


def test_many_threads_and_another_process_can_read(tmp_path):
    dataset = pickle.loads(pickle.dumps(RldsDataset(whole(tmp_path, [4] * 6))))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda episode: numbers_of(dataset, "image", episode), dataset.episodes))
    assert found == [counted(number, 4) for number in range(6)]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(DatasetError, match=r"pip install 'lara-adapter\[rlds\]'"):
        RldsDataset(whole(tmp_path))
