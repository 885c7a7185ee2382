"""Robomimic's and LIBERO's HDF5 files: what is found, streamed, and left out with its reason."""

from __future__ import annotations

import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("h5py")
pytest.importorskip("av")

import h5py
from helpers.formats import ENV_ARGS, actions_of, counted, numbers_of, write_hdf5

from lara_adapter import DatasetError
from lara_adapter.data.hdf5 import Hdf5Dataset

IMAGE, WRIST = "agentview_image", "robot0_eye_in_hand_image"


@pytest.mark.parametrize("kind", ["plain", "gzip", "planes", "vlen", "padded"])
def test_every_way_to_store_frames(tmp_path, kind):
    dataset = Hdf5Dataset(write_hdf5(tmp_path / "lift.hdf5", [5, 9], kind))
    assert dataset.cameras == (IMAGE, WRIST)
    assert dataset.depth == ("agentview_depth",)
    assert (dataset.fps, dataset.total_frames, dataset.name) == (20, 14, "lift.hdf5")
    assert numbers_of(dataset, IMAGE) == counted(0, 5) + counted(1, 9)
    assert numbers_of(dataset, WRIST, dataset.episodes[1]) == counted(9, 9)
    some = dataset.pick(IMAGE, dataset.episodes[1], [7, 2, 3, 99])
    whole = [frame for _, frames in dataset.frames(IMAGE, [dataset.episodes[1]]) for frame in frames]
    assert list(some) == [2, 3, 7]
    assert all((frame == whole[place]).all() for place, frame in some.items())
    assert whole[0].dtype == np.uint8
    assert dataset.check([IMAGE, WRIST], rows=True) == {}


def test_a_folder_is_numbered_file_by_file_in_natural_order(tmp_path):
    write_hdf5(tmp_path / "task_10.hdf5", [3], first=11)
    write_hdf5(tmp_path / "task_2.h5", range(2, 13))
    dataset = Hdf5Dataset(tmp_path)
    assert [episode.length for episode in dataset.episodes] == [*range(2, 13), 3]
    assert dataset.episode(10).name == "demo_10 of task_2.h5"  # not demo_1, demo_10, demo_2
    assert numbers_of(dataset, IMAGE, dataset.episode(11)) == counted(11, 3)
    sources = list(dataset.sources(IMAGE))
    assert len(sources) == 12
    assert sources[11].path == tmp_path / "task_10.hdf5"
    dataset.select(["10:12"])
    assert [episode.number for episode in dataset.episodes] == [10, 11]


def test_actions_keep_their_float_type(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [4, 6])
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = np.arange(4)
    dataset = Hdf5Dataset(path)
    assert np.array_equal(dataset.actions(dataset.episodes[1]), actions_of(1, 6))
    assert dataset.actions(dataset.episodes[1]).dtype == np.float64
    whole = dataset.actions(dataset.episodes[0])
    assert (whole.shape, whole.dtype) == ((4, 1), np.float32)


def test_a_file_without_actions_has_none(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [4])
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
    dataset = Hdf5Dataset(path)
    assert dataset.actions(dataset.episodes[0]) is None
    assert dataset.check([IMAGE], rows=True) == {}


def test_damaged_demonstrations_are_left_out_by_number_and_reason(tmp_path, caplog):
    path = write_hdf5(tmp_path / "a.hdf5", [4, 5, 6, 7, 3])
    with h5py.File(path, "a") as file:
        del file["data/demo_0"].attrs["num_samples"]
        del file["data/demo_1/obs"][IMAGE]
        file["data/demo_2"].attrs["num_samples"] = 5
        del file["data/demo_3/actions"]
        file["data/demo_3/actions"] = np.zeros((6, 7))
    dataset = Hdf5Dataset(path)
    assert [episode.number for episode in dataset.episodes] == [1, 2, 3, 4]
    assert "demo_0" in dataset.left_out[0]
    assert "num_samples" in dataset.left_out[0]
    assert "demo_0" in caplog.text
    found = dataset.check([IMAGE], rows=True)
    assert sorted(found) == [1, 2, 3]
    assert "agentview_image is missing" in found[1]
    assert "agentview_image has 6 entries, but num_samples is 5" in found[2]
    assert "actions has 6 entries, but num_samples is 7" in found[3]
    assert sorted(dataset.check([WRIST])) == [2]
    with pytest.raises(DatasetError, match=r"a\.hdf5: episode 1 \(demo_1\) is damaged: agentview_image"):
        numbers_of(dataset, IMAGE, dataset.episodes[0])
    with pytest.raises(DatasetError, match="has 6 entries"):
        dataset.actions(dataset.episode(3))
    dataset.leave_out(found)
    assert numbers_of(dataset, IMAGE) == counted(4, 3)


def test_a_truncated_file_does_not_block_the_others(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [4])
    path.write_bytes(path.read_bytes()[:-4000])
    write_hdf5(tmp_path / "b.hdf5", [5], first=1)
    dataset = Hdf5Dataset(tmp_path)
    assert numbers_of(dataset, IMAGE) == counted(1, 5)
    assert "truncated" in dataset.left_out[0]
    with pytest.raises(DatasetError, match=r"a\.hdf5 cannot be read"):
        Hdf5Dataset(path)


def test_a_damaged_chunk_is_named_with_its_frames(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", [12], "gzip")
    with h5py.File(path, "r") as file:
        chunk = file[f"data/demo_0/obs/{IMAGE}"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 10 : chunk.byte_offset + chunk.size] = bytes(chunk.size - 10)
    path.write_bytes(content)
    dataset = Hdf5Dataset(path)
    with pytest.raises(DatasetError, match=r"a\.hdf5: episode 0 \(demo_0\) is damaged: agentview_image, frames 4 to 6"):
        dataset.pick(IMAGE, dataset.episodes[0], [0, 4, 6])


@pytest.mark.parametrize(("content", "hint"), [
    ({"observations/images/top": np.zeros((4, 8, 8, 3), np.uint8)}, "data/demo_0, ... is expected"),
    ({"data/demo_0/obs/robot0_eef_pos": np.zeros((4, 3))}, "dataset_states_to_obs.py"),
])  # fmt: skip
def test_another_layout_is_refused_with_what_to_do(tmp_path, content, hint):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name, values in content.items():
            file[name] = values
        if "data" in file:
            file["data/demo_0"].attrs["num_samples"] = 4
    with pytest.raises(DatasetError, match=hint):
        Hdf5Dataset(tmp_path / "a.hdf5")
    assert Hdf5Dataset.recognises(tmp_path) == ("dataset_states" in hint)


def test_what_is_recognised(tmp_path):
    write_hdf5(tmp_path / "task" / "a.hdf5", [2])
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "half.h5").write_bytes(b"\x89HDF\r\n\x1a\n cut")
    assert Hdf5Dataset.recognises(tmp_path / "task")
    assert Hdf5Dataset.recognises(tmp_path / "task" / "a.hdf5")
    assert Hdf5Dataset.recognises(tmp_path / "half.h5")  # its own reader says what is wrong with it
    assert not Hdf5Dataset.recognises(tmp_path / "a.mp4")
    (tmp_path / "half.h5").unlink()
    assert not Hdf5Dataset.recognises(tmp_path)
    with pytest.raises(DatasetError, match=r"holds no file that ends in \.hdf5 or \.h5"):
        Hdf5Dataset(tmp_path)


def test_the_rate_is_the_files_or_the_arguments(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_hdf5(tmp_path / "a.hdf5", [2], env_args={})
    assert Hdf5Dataset(path).fps == 20
    assert "no control_freq: 20 frames per second are assumed" in caplog.text
    assert Hdf5Dataset(path, fps=12).fps == 12
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = "{"
    assert numbers_of(Hdf5Dataset(path), IMAGE) == counted(0, 2)
    assert "a.hdf5: its metadata cannot be read" in caplog.text
    write_hdf5(tmp_path / "b.hdf5", [2])
    write_hdf5(tmp_path / "c.hdf5", [2], env_args={"env_kwargs": {"control_freq": 10}})
    with pytest.raises(DatasetError, match="10, 20 frames per second"):
        Hdf5Dataset(tmp_path)
    assert Hdf5Dataset(tmp_path, fps=10).fps == 10


def test_libero_is_said_to_be_upside_down_and_masks_to_be_ignored(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_hdf5(tmp_path / "a.hdf5", [2, 2], env_args=ENV_ARGS | {"env_name": "Libero_Kitchen"})
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_0"])
    write_hdf5(tmp_path / "b.hdf5", [2], env_args=ENV_ARGS | {"env_name": "Libero_Kitchen"})
    Hdf5Dataset(tmp_path)
    assert caplog.text.count("upside down") == 1
    assert "not only those of mask/train" in caplog.text


def test_many_threads_and_another_process_can_read(tmp_path):
    dataset = pickle.loads(pickle.dumps(Hdf5Dataset(write_hdf5(tmp_path / "a.hdf5", [5] * 6))))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda episode: numbers_of(dataset, IMAGE, episode), dataset.episodes))
    assert found == [counted(number, 5) for number in range(6)]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "a.hdf5", [2])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match=r"pip install 'lara-adapter\[hdf5\]'"):
        Hdf5Dataset(path)
    assert Hdf5Dataset.recognises(path)
