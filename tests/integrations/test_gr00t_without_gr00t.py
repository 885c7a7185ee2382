"""What of the GR00T integration needs no gr00t: frames from any dataset of that shape, the export, the refusals.

The rest runs on the real code in tests/hosts/test_gr00t.py.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lara_adapter import AdapterFormatError, FrameError, HostNotInstalled, LaraArgumentError, LaraError

pytest.importorskip("transformers")

from lara_adapter.integrations.gr00t import LaraSettings, add_frames, export_policy, run
from safetensors.torch import load_file, save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "gr00t_posttrain.py"
without_gr00t = pytest.mark.skipif(importlib.util.find_spec("gr00t") is not None, reason="gr00t is installed here")


class Column:
    def __init__(self, frames):
        self.iloc = frames


class Episode(dict):
    """As a pandas table: columns of frames, length in rows. Frame t of view v is filled with 3 t + v."""

    def __init__(self, length, views=("front", "wrist"), shape=(12, 16, 3)):
        super().__init__({f"video.{v}": Column([np.full(shape, 3 * t + k, np.uint8) for t in range(length)])
                          for k, v in enumerate(views)})  # fmt: skip
        self.length = length

    def __len__(self):
        return self.length


class Dataset:
    shard_size, dataset_path, video_backend = 1024, "demonstrations", "torchcodec"

    def __init__(self, horizon=16, views=("front", "wrist"), tag="arm"):
        self.modality_configs = {
            "video": SimpleNamespace(modality_keys=list(views)),
            "action": SimpleNamespace(delta_indices=list(range(horizon))),
        }
        self.embodiment_tag = SimpleNamespace(value=tag)

    def get_datapoint(self, episode_data, step_index):
        return {"state": np.zeros(2), "step": step_index}


def values(sample):
    return sample["lara_frames"].reshape(-1, 3 * 8 * 8).mean(1).tolist()


def test_pairs_of_every_view_and_the_flag():
    dataset = Dataset(horizon=5)
    add_frames(dataset, views=["front", "wrist"], frame_size=8)
    sample = dataset.get_datapoint(Episode(10), np.int64(3))
    assert values(sample) == [9, 24, 10, 25]
    assert sample["lara_frames"].shape == (2, 2, 3, 8, 8)
    assert sample["lara_frames_valid"].dtype == np.bool_
    assert sample["lara_frames_valid"]
    assert sample["step"] == 3  # the dataset's own sample is kept
    last = dataset.get_datapoint(Episode(10), 7)
    assert values(last) == [21, 27, 22, 28]
    assert not last["lara_frames_valid"]


def test_a_subclass_of_the_dataset_keeps_its_methods_and_pickles():
    dataset = Recorded()
    add_frames(dataset, gap=2, frame_size=8)
    copied = pickle.loads(pickle.dumps(dataset))
    assert copied.get_datapoint(Episode(5), 1)["mine"] == 1
    assert values(copied.get_datapoint(Episode(5), 1)) == [3, 9]


class Recorded(Dataset):
    def get_datapoint(self, episode_data, step_index):
        return {**super().get_datapoint(episode_data, step_index), "mine": 1}


def test_a_mixture_takes_views_by_embodiment():
    arm, hand = Dataset(), Dataset(8, ("top",), "hand")
    mixture = SimpleNamespace(datasets=[arm, hand])
    placed = add_frames(mixture, views={"arm": ["wrist"], "hand": ["top"]}, frame_size=8)
    assert [(frames.views, frames.gap) for frames in placed] == [(("wrist",), 16), (("top",), 8)]
    assert values(hand.get_datapoint(Episode(20, ("top",)), 0)) == [0, 24]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"views": ["top"]}, FrameError, r"\['top'\] are not loaded for arm, which has \['front', 'wrist'\]"),
        ({"views": {"leg": ["top"]}}, FrameError, r"no entry for the embodiment 'arm'; it has \['leg'\]"),
        ({"gap": 0}, LaraArgumentError, "gap=0, but an integer >= 1"),
        ({"gap": 2.5}, LaraArgumentError, r"gap=2\.5"),
        ({"frame_size": True}, LaraArgumentError, "frame_size=True"),
    ],
)
def test_mistakes_are_named_and_leave_the_dataset_alone(arguments, error, words):
    dataset = Dataset()
    with pytest.raises(error, match=words):
        add_frames(dataset, **arguments)
    assert "get_datapoint" not in vars(dataset)


def test_mixtures_whose_views_do_not_fit_into_one_batch():
    mixture = SimpleNamespace(datasets=[Dataset(), Dataset(8, ("top",), "hand")])
    with pytest.raises(FrameError, match=r"\[1, 2\] views"):
        add_frames(mixture, views={"arm": ["front", "wrist"], "hand": ["top"]})
    assert all("get_datapoint" not in vars(dataset) for dataset in mixture.datasets)


def test_a_gap_that_no_episode_reaches():
    dataset = Dataset(horizon=5)
    dataset.episode_loader = SimpleNamespace(episode_lengths=[3, 5])
    with pytest.raises(
        LaraArgumentError, match=r"gap=5 steps, but the longest episode of demonstrations has 5: no pair"
    ):
        add_frames(dataset)
    assert "get_datapoint" not in vars(dataset)
    dataset.episode_loader.episode_lengths.append(6)
    assert add_frames(dataset)[0].gap == 5


def test_the_memory_is_said(caplog):
    with caplog.at_level("INFO", logger="lara_adapter"):
        add_frames(Dataset())
    assert "301 kB a sample, up to 0.62 GB in each data worker" in caplog.text


# ---------------------------------------------------------------------- export


def checkpoint(folder: Path, shards: int) -> Path:
    folder.mkdir()
    policy = {f"action_head.w{i}": torch.randn(3, 4) for i in range(4)}
    ours = {"lara.projector.0.weight": torch.randn(2, 4), "lara._step": torch.tensor(5)}
    names = [*policy, *ours]
    everything = {**policy, **ours}
    if shards == 1:
        save_file(everything, folder / "model.safetensors", {"format": "pt"})
    else:
        parts = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, inside in parts.items():
            save_file({name: everything[name] for name in inside}, folder / file, {"format": "pt"})
        weight_map = {name: file for file, inside in parts.items() for name in inside}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "processor_config.json", "statistics.json"):
        (folder / name).write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "trainer_state.json", "latest",
                 "zero_to_fp32.py", "zero_to_torch.py"):  # fmt: skip
        (folder / name).write_bytes(b"x")
    for name in ("experiment_cfg", "lara", "global_step10"):
        (folder / name).mkdir()
        (folder / name / "inside").write_text("x")
    torch.save(policy, folder.parent / "policy.pt")
    return folder


@pytest.mark.parametrize("shards", [1, 3, 6])
def test_export_keeps_the_policy_and_what_serves_acting(tmp_path, shards):
    source = checkpoint(tmp_path / "checkpoint-10", shards)
    target = export_policy(source, tmp_path / "policy")
    found = {}
    for file in target.glob("*.safetensors"):
        found.update(load_file(file))
    policy = torch.load(tmp_path / "policy.pt", weights_only=True)
    assert found.keys() == policy.keys()
    assert all(torch.equal(found[name], policy[name]) for name in policy)
    others = {entry.name for entry in target.iterdir() if not entry.match("model*")}
    assert others == {"config.json", "processor_config.json", "statistics.json", "experiment_cfg"}
    if shards > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == policy.keys()
        assert {file.name for file in target.glob("*.safetensors")} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == 4 * 3 * 4 * 4


def test_a_second_export_leaves_nothing_of_the_first(tmp_path):
    export_policy(checkpoint(tmp_path / "a", 3), tmp_path / "policy")
    export_policy(checkpoint(tmp_path / "b", 1), tmp_path / "policy")
    assert [file.name for file in (tmp_path / "policy").glob("model*")] == ["model.safetensors"]


def test_export_of_an_output_folder_has_the_processor_and_neither_checkpoints_nor_earlier_exports(tmp_path):
    output = checkpoint(tmp_path / "run", 1)
    for name in ("processor_config.json", "statistics.json"):
        (output / name).unlink()
    (output / "processor").mkdir()
    (output / "processor" / "processor_config.json").write_text('{"of": "the processor"}')
    (output / "checkpoint-10").mkdir()
    (output / "checkpoint-10" / "model.safetensors").write_bytes(b"x")
    wanted = {"config.json", "processor_config.json", "experiment_cfg", "model.safetensors"}
    for _ in range(2):  # into the output folder itself, where the first one already is
        target = export_policy(output, output / "policy")
        assert {entry.name for entry in target.iterdir()} == wanted
    assert json.loads((target / "processor_config.json").read_text()) == {"of": "the processor"}
    assert (
        load_file(target / "model.safetensors").keys() == torch.load(tmp_path / "policy.pt", weights_only=True).keys()
    )
    assert {entry.name for entry in export_policy(output, tmp_path / "elsewhere").iterdir()} == wanted


def test_export_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(AdapterFormatError, match="neither model"):
        export_policy(tmp_path, tmp_path / "policy")
    source = checkpoint(tmp_path / "a", 1)
    with pytest.raises(AdapterFormatError, match="checkpoint itself"):
        export_policy(source, tmp_path / "a")
    assert not (tmp_path / "policy").exists()


# ---------------------------------------------------------------------- without gr00t


def test_a_run_without_a_lam_says_which_flag():
    with pytest.raises(LaraError, match=r"--lara\.lam FOLDER_OR_HUB_ID .*lara train-lam VIDEOS"):
        LaraSettings().build_lam()


@without_gr00t
def test_run_says_how_to_install_gr00t():
    with pytest.raises(HostNotInstalled, match=r"git clone -b n1\.6-release"):
        run(SimpleNamespace(model=None), LaraSettings(lam="x"))


@without_gr00t
def test_the_example_says_how_to_install_gr00t_and_exits_with_2():
    done = subprocess.run([sys.executable, str(EXAMPLE), "--smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "git clone -b n1.6-release" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_attach_and_cache(tmp_path):
    from helpers.toys import DitPolicy, OwnLam

    policy = DitPolicy()
    lara = LaraSettings(layer=-1, alignment="contrastive", temperature=0.2, train_lam=False).attach(policy, OwnLam())
    assert (lara.config.layer, lara.config.train_lam) == (5, False)
    assert (lara.config.alignment["name"], lara.config.alignment["temperature"]) == ("contrastive", 0.2)
    with pytest.raises(LaraArgumentError, match="OwnLam is not a LatentActionModel"):
        LaraSettings(feature_cache=str(tmp_path)).attach(DitPolicy(), OwnLam())
