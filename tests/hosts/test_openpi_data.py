"""Frames through openpi's own data pipeline: the right pair, the ends masked, and the model's inputs bit-identical."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("openpi", reason="openpi is not installed: make test-openpi")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-openpi")

from helpers import openpi_disk
from lara_adapter.integrations.openpi import FramePlan, create_data_loader, observation_frames
from openpi.models.model import Observation
from openpi.training import config as configs
from openpi.training import data_loader as host

from examples import openpi_tiny
from examples.openpi_tiny import FPS, HORIZON, IMAGE_SIZE
from lara_adapter import FrameError, LaraArgumentError

LENGTHS = [24, 25, 26, 27]
C = 5


@pytest.fixture(scope="module")
def folder():
    return openpi_disk.written()


@pytest.fixture(scope="module")
def videos(folder):
    return openpi_tiny.write_demonstrations("tiny/videos", episodes=2, videos=True)


def config_of(folder, **changes):
    return openpi_tiny.train_config(folder, **changes)


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def items_of(loader):
    """The dataset that the workers read, item by item."""
    return loader.loader._data_loader.torch_loader.dataset


def recorded(folder, repo_id=openpi_tiny.REPO_ID):
    return host._import_lerobot_dataset().LeRobotDataset(repo_id)


def as_uint8(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().to(torch.uint8).numpy()


def leaves(observation) -> dict[str, torch.Tensor]:
    found = {}
    for field in Observation.__dataclass_fields__:
        value = getattr(observation, field)
        for key, tensor in value.items() if isinstance(value, dict) else [("", value)]:
            found[field, key] = tensor
    return found


def assert_same_inputs(ours, stock, batches: int) -> None:
    for (seen, actions), (plain, plain_actions) in itertools.islice(zip(ours, stock), batches):
        assert torch.equal(actions, plain_actions)
        found, wanted = leaves(seen), leaves(plain)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert value is None or torch.equal(found[key], value), key
            assert (value is None) == (found[key] is None), key


# ---------------------------------------------------------------------- what the model sees


@pytest.mark.parametrize("pi05", [True, False])
def test_the_models_inputs_are_bit_identical_to_stock_openpis(folder, pi05):
    config = config_of(folder, pi05=pi05)
    ours = create_data_loader(config, FramePlan(gap=C))
    assert_same_inputs(ours, host.create_data_loader(config, framework="pytorch", shuffle=True), 8)
    seen, _ = next(iter(ours))
    assert isinstance(seen, Observation)
    assert set(seen.images) == {"base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"}
    assert seen.lara_frames.dtype == torch.uint8
    assert list(seen.lara_frames.shape) == [4, 2, 3, 224, 224]
    assert seen.lara_frames_valid.dtype == torch.bool


def test_of_videos_too(folder, videos):
    config = with_data(config_of(folder), repo_id="tiny/videos")
    ours = create_data_loader(config, FramePlan(gap=C, frame_size=IMAGE_SIZE))
    assert_same_inputs(ours, host.create_data_loader(config, framework="pytorch", shuffle=True), 3)
    sample, raw = items_of(ours)[3], recorded(folder, "tiny/videos")
    assert np.array_equal(sample["lara_frames"][0], as_uint8(raw[3]["image"]))
    assert np.array_equal(sample["lara_frames"][1], as_uint8(raw[3 + C]["image"]))


@pytest.mark.slow
def test_in_worker_processes(folder):
    config = config_of(folder, num_workers=1)
    ours = create_data_loader(config, FramePlan(gap=C, frame_size=32))
    stock = host.create_data_loader(config_of(folder), framework="pytorch", shuffle=True)
    assert_same_inputs(ours, stock, 2)


def test_openpi_is_as_before_afterwards(folder):
    functions = host.create_torch_dataset, host.transform_dataset
    create_data_loader(config_of(folder), FramePlan(gap=C))
    with pytest.raises(LaraArgumentError):
        create_data_loader(config_of(folder), FramePlan(gap=1000))
    assert (host.create_torch_dataset, host.transform_dataset) == functions
    batch = next(iter(host.create_data_loader(config_of(folder), framework="pytorch", shuffle=True)))
    assert type(batch[0]) is Observation


# ---------------------------------------------------------------------- the pair


def test_the_pair_is_now_and_c_steps_later_and_ends_are_masked(folder):
    loader = create_data_loader(config_of(folder), FramePlan(gap=C, frame_size=IMAGE_SIZE))
    raw, items = recorded(folder), items_of(loader)
    assert len(items) == len(raw) == sum(LENGTHS)
    start = 0
    for length in LENGTHS:
        for step in (0, 1, length - C - 1, length - C, length - 1):
            item = items[start + step]
            now, later = start + step, start + min(step + C, length - 1)
            assert np.array_equal(item["lara_frames"][0], as_uint8(raw[now]["image"]))
            assert np.array_equal(item["lara_frames"][1], as_uint8(raw[later]["image"]))
            assert bool(item["lara_frames_valid"]) is (step + C < length)
            assert item["lara_frames_valid"].dtype == np.bool_
        start += length


def test_c_is_the_action_chunk_by_default(folder):
    loader = create_data_loader(config_of(folder))
    assert loader.plan.gap == HORIZON
    assert loader.plan.views == ("image",)  # becomes base_0_rgb
    valid = [bool(items_of(loader)[i]["lara_frames_valid"]) for i in range(LENGTHS[0])]
    assert valid == [True] * (LENGTHS[0] - HORIZON) + [False] * HORIZON


def test_several_cameras_are_views(folder):
    loader = create_data_loader(config_of(folder), FramePlan(["wrist_image", "image"], C, IMAGE_SIZE))
    item, raw = items_of(loader)[0], recorded(folder)
    assert item["lara_frames"].shape == (2, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert np.array_equal(item["lara_frames"][0, 1], as_uint8(raw[C]["wrist_image"]))
    assert np.array_equal(item["lara_frames"][1, 0], as_uint8(raw[0]["image"]))
    pair = observation_frames(next(iter(loader))[0])
    assert list(pair.present.shape) == [4, 2, 3, IMAGE_SIZE, IMAGE_SIZE]


def test_the_base_camera_is_found_behind_any_name(folder):
    """A config that maps the wrist camera to the main image."""

    @dataclasses.dataclass(frozen=True)
    class Swapped(configs.LeRobotLiberoDataConfig):
        def create(self, *args):
            stock = super().create(*args)
            (repack,) = stock.repack_transforms.inputs
            names = {**repack.structure, "observation/image": "wrist_image", "observation/wrist_image": "image"}
            group = dataclasses.replace(stock.repack_transforms, inputs=[type(repack)(names)])
            return dataclasses.replace(stock, repack_transforms=group)

    config = config_of(folder)
    settings = {field.name: getattr(config.data, field.name) for field in dataclasses.fields(config.data)}
    loader = create_data_loader(dataclasses.replace(config, data=Swapped(**settings)))
    assert loader.plan.views == ("wrist_image",)


def test_a_resized_pair_keeps_its_colours(folder):
    item = items_of(create_data_loader(config_of(folder), FramePlan(gap=C, frame_size=16)))[0]
    assert item["lara_frames"].shape == (2, 3, 16, 16)
    whole = as_uint8(recorded(folder)[0]["image"]).astype(float).mean((1, 2))
    assert item["lara_frames"][0].astype(float).mean((1, 2)) == pytest.approx(whole, abs=1.5)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"views": "top"}, r"views \['top'\] are not in the dataset, which has \['image', 'wrist_image'\]"),
        ({"gap": 27}, r"gap=27 steps, but the longest episode of the dataset has 27"),
        ({"gap": 0}, "gap=0, but an integer >= 1"),
        ({"frame_size": 2.5}, r"frame_size=2\.5"),
        ({"views": ["image", "image"]}, "different ones are expected"),
    ],
)
def test_mistakes_are_named(folder, plan, words):
    with pytest.raises(LaraArgumentError, match=words):
        create_data_loader(config_of(folder), FramePlan(**plan))


def test_openpis_fake_data_has_no_frames(folder):
    with pytest.raises(LaraArgumentError, match="FakeDataset, but a LeRobot dataset is expected"):
        create_data_loader(dataclasses.replace(config_of(folder), data=configs.FakeDataConfig()))


def test_a_stock_observation_has_none(folder):
    seen, _ = next(iter(host.create_data_loader(config_of(folder), framework="pytorch", shuffle=True)))
    with pytest.raises(FrameError, match="carries no lara_frames"):
        observation_frames(seen)


def test_the_frames_move_with_the_observation(folder):
    import jax

    seen, _ = next(iter(create_data_loader(config_of(folder), FramePlan(gap=C, frame_size=16))))
    moved = jax.tree.map(lambda x: x.to("meta"), seen)  # openpi's loop moves it so
    assert moved.lara_frames.is_meta
    assert moved.images["base_0_rgb"].is_meta
    assert recorded(folder).fps == FPS
