"""Frames for LARA out of LeRobot's datasets: against LeRobot's own reading, and against what the pictures show."""

from __future__ import annotations

import pickle

import pytest
import torch

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("datasets", reason="LeRobot's datasets are not installed: make test-lerobot")

from helpers.lerobot_disk import FPS, LENGTHS, PIXELS, TOP, WRIST, make_dataset, open_dataset, read_picture
from helpers.toys import SIZE, OwnLam
from lara_adapter.integrations.lerobot import LaraDataset
from lara_adapter.integrations.lerobot.dataset import FRAMES, VALID
from lerobot.datasets import EpisodeAwareSampler

from lara_adapter import LaraArgumentError, attach_lara

C = 4


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lerobot")
    return {
        "video": make_dataset(folder / "video"),
        "image": make_dataset(folder / "image", "image"),
        "two": make_dataset(folder / "two", cameras=(TOP, WRIST), lengths=(8, 6)),
    }


def same(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Dim:
    """An augmentation that draws random numbers."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image * (0.2 + 0.3 * torch.rand(()))).to(image.dtype)


@pytest.mark.parametrize("dtype", ["video", "image"])
@pytest.mark.parametrize("episodes", [None, [2], [0, 2]])
def test_pairs_are_those_that_lerobot_reads_itself(roots, dtype, episodes):
    """Its delta_timestamps give the same two frames and the same flags, at every index."""
    plain = open_dataset(roots[dtype], episodes=episodes)
    wrapped = LaraDataset(plain, gap=C)
    reference = open_dataset(roots[dtype], episodes=episodes, delta_timestamps={TOP: [0, C / FPS]})
    assert len(wrapped) == len(reference) == sum(n for e, n in enumerate(LENGTHS) if episodes is None or e in episodes)
    for index in range(len(wrapped)):
        item, wanted = wrapped[index], reference[index]
        frames, padded = wanted[TOP], wanted[f"{TOP}_is_pad"]
        if frames.is_floating_point():
            frames = (frames * 255).round().to(torch.uint8)
        assert item[FRAMES].dtype == torch.uint8
        assert item[FRAMES].shape == (2, 3, PIXELS, PIXELS)
        assert item[VALID].dtype == torch.bool
        assert bool(item[VALID]) is not bool(padded[1])
        assert torch.equal(item[FRAMES][0], frames[0])
        assert torch.equal(item[FRAMES][1], frames[1] if item[VALID] else frames[0])


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_pairs_show_c_steps_of_one_episode(roots, dtype):
    """Read off the pixels, without LeRobot's word for it; no pair crosses an episode's end."""
    wrapped = LaraDataset(open_dataset(roots[dtype]), gap=C)
    pairs = 0
    for index in range(len(wrapped)):
        item = wrapped[index]
        episode, time = int(item["episode_index"]), int(item["frame_index"])
        assert read_picture(item[FRAMES][0]) == (episode, time)
        assert bool(item[VALID]) is (time + C < LENGTHS[episode])
        if item[VALID]:
            assert read_picture(item[FRAMES][1]) == (episode, time + C)
            pairs += 1
    assert pairs == sum(n - C for n in LENGTHS)


@pytest.mark.parametrize("dtype", ["video", "image"])
@pytest.mark.parametrize("deltas", [None, [0.0], [-1 / FPS, 0.0], [i / FPS for i in range(8)]])
@pytest.mark.parametrize("augment", [False, True])
def test_what_the_policy_gets_is_untouched(roots, dtype, deltas, augment):
    """Every key of LeRobot's item, bit for bit, with the time windows of pi0, SmolVLA, Multi-Task DiT and VLA-JEPA."""
    windows = None if deltas is None else {TOP: deltas, "observation.state": deltas, "action": [0, 1 / FPS]}
    settings = {"delta_timestamps": windows, "image_transforms": Dim() if augment else None}
    plain = open_dataset(roots[dtype], **settings)
    wrapped, bare = LaraDataset(plain, gap=C), LaraDataset(open_dataset(roots[dtype]), gap=C)
    for index in (0, 5, 11, 13, 20):
        torch.manual_seed(index)
        wanted = plain[index]
        after = torch.get_rng_state()
        torch.manual_seed(index)
        item = wrapped[index]
        assert torch.equal(torch.get_rng_state(), after)  # nothing of ours shifts what follows
        assert item.keys() - wanted.keys() == {FRAMES, VALID}
        assert all(same(item[key], wanted[key]) for key in wanted)
        assert torch.equal(item[FRAMES], bare[index][FRAMES])  # the LAM's frames are never augmented
    if augment:
        assert not torch.equal(wrapped[0][TOP].float(), bare[0][TOP].float())


def test_several_cameras_are_views_in_the_order_asked_for(roots):
    plain = open_dataset(roots["two"])
    top, wrist = (LaraDataset(plain, gap=C, views=name)[1][FRAMES] for name in ("top", WRIST))
    both = LaraDataset(plain, gap=C, views=["wrist", TOP])
    assert both.views == [WRIST, TOP]
    assert torch.equal(both[1][FRAMES], torch.stack([wrist, top]))
    assert LaraDataset(plain, gap=C, views="all").views == [TOP, WRIST]
    assert not torch.equal(top, wrist)


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_resizing(roots, dtype):
    plain = open_dataset(roots[dtype])
    small = LaraDataset(plain, gap=C, frame_size=16)[1][FRAMES]
    assert small.dtype == torch.uint8
    assert small.shape == (2, 3, 16, 16)
    assert [read_picture(frame) for frame in small] == [(0, 1), (0, 1 + C)]
    assert LaraDataset(plain, gap=C, frame_size=(16, 24))[1][FRAMES].shape == (2, 3, 16, 24)
    assert torch.equal(LaraDataset(plain, gap=C, frame_size=PIXELS)[1][FRAMES], LaraDataset(plain, gap=C)[1][FRAMES])


def test_it_stands_in_for_the_dataset(roots, monkeypatch):
    """LeRobot's loop reads attributes of the dataset and samples by its indices."""
    wrapped = LaraDataset(open_dataset(roots["video"], episodes=[1, 2]), gap=C)
    assert (wrapped.num_frames, wrapped.num_episodes, wrapped.episodes) == (29, 2, [1, 2])
    episodes = wrapped.meta.episodes
    sampler = EpisodeAwareSampler(
        episodes["dataset_from_index"],
        episodes["dataset_to_index"],
        episode_indices_to_use=wrapped.episodes,
        shuffle=True,
        seed=0,
        absolute_to_relative_idx=wrapped.absolute_to_relative_idx,
    )
    loader = torch.utils.data.DataLoader(wrapped, batch_size=8, sampler=sampler)
    batches = list(loader)
    assert batches[0][FRAMES].shape == (8, 2, 3, PIXELS, PIXELS)
    assert batches[0][VALID].shape == (8,)
    shown = {read_picture(pair[0]) for batch in batches for pair in batch[FRAMES]}
    assert shown == {(e, t) for e in (1, 2) for t in range(LENGTHS[e])}
    assert sum(int(batch[VALID].sum()) for batch in batches) == sum(LENGTHS[e] - C for e in (1, 2))
    assert [len(wrapped[1:4]), len(torch.utils.data.Subset(wrapped, [3, 4]))] == [3, 2]
    assert not hasattr(wrapped, "no_such_attribute")
    # torch's loader would take a batch through the dataset's own, past the frames
    monkeypatch.setattr(type(wrapped.dataset), "__getitems__", lambda self, indices: [], raising=False)
    assert all(FRAMES in item for item in wrapped.__getitems__([0, 1]))
    assert next(iter(loader))[FRAMES].shape == (8, 2, 3, PIXELS, PIXELS)


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_pickle(roots, dtype):
    wrapped = LaraDataset(open_dataset(roots[dtype]), gap=C)
    copy = pickle.loads(pickle.dumps(wrapped))
    assert torch.equal(copy[7][FRAMES], wrapped[7][FRAMES])


@pytest.mark.slow
def test_spawned_workers(roots):
    """As lerobot-train starts them."""
    wrapped = LaraDataset(open_dataset(roots["video"]), gap=C)
    loader = torch.utils.data.DataLoader(wrapped, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    first = next(iter(loader))
    assert torch.equal(first[FRAMES], torch.stack([wrapped[i][FRAMES] for i in range(4)]))


def test_refusals(roots):
    plain, two = open_dataset(roots["video"]), open_dataset(roots["two"])

    def refused(match: str, dataset=plain, **arguments) -> None:
        with pytest.raises(LaraArgumentError, match=match):
            LaraDataset(dataset, **{"gap": C, **arguments})

    refused("2 colour cameras; choose one of .*top.*wrist", two)
    refused("views='side', but the dataset's colour cameras are", views="side")
    refused("one or several different ones", views=[TOP, "top"])
    refused("gap=0", gap=0)
    refused("the longest episode of the dataset has 20: no pair would be valid", gap=20)
    refused("frame_size=", frame_size=(0, 5))
    refused("is a Subset, but a LeRobotDataset is expected", torch.utils.data.Subset(plain, [0]))
    two.meta.features[WRIST]["shape"] = (8, 8, 3)
    refused("cameras of different shapes.*pass frame_size=", two, views="all")


def test_streaming_is_refused(roots):
    from lerobot.datasets.streaming_dataset import StreamingLeRobotDataset

    streaming = StreamingLeRobotDataset("local/tiny", root=roots["image"])
    with pytest.raises(LaraArgumentError, match=r"StreamingLeRobotDataset streams .*--dataset.streaming=false"):
        LaraDataset(streaming, gap=C)


def test_smolvla_sees_the_present(roots, monkeypatch):
    """Given [t, t + C] under the camera's own key SmolVLA takes the last one, the future, and says nothing."""
    from helpers.lerobot_tiny import make_policy

    policy = make_policy("smolvla")
    seen = []
    prepare = type(policy).prepare_images
    monkeypatch.setattr(type(policy), "prepare_images", lambda self, batch: seen.append(batch) or prepare(self, batch))
    attach_lara(policy, OwnLam())

    def batch_of(dataset) -> dict:
        batch = torch.utils.data.default_collate([dataset[i] for i in (0, 12, 15)])
        image = batch[TOP].float() / 255
        return {
            **{key: value for key, value in batch.items() if key.startswith("observation.lara")},
            "observation.images.cam": image,
            "observation.state": torch.zeros(3, 4),
            "action": torch.zeros(3, 8, 3),
            "observation.language.tokens": torch.ones(3, 7, dtype=torch.long),
            "observation.language.attention_mask": torch.ones(3, 7, dtype=torch.bool),
        }

    def taken() -> list[tuple[int, int]]:
        images, _ = prepare(policy, seen[-1])
        return [read_picture((image + 1) * 127.5) for image in images[0]]

    now = [(0, 0), (0, 12), (1, 1)]
    settings = {"delta_timestamps": {TOP: [0.0]}}  # SmolVLA's own window
    loss, report = policy.forward(
        batch_of(LaraDataset(open_dataset(roots["video"], **settings), gap=C, frame_size=SIZE))
    )
    loss.backward()
    assert taken() == now
    assert not any("lara" in key for key in seen[-1])
    assert report["lara/valid_fraction"] == pytest.approx(2 / 3)
    # the trap is real: the same with both frames under the camera's key
    policy.lara.detach()
    both = batch_of(open_dataset(roots["video"], delta_timestamps={TOP: [0.0, C / FPS]}))
    policy.forward(both)
    assert taken() == [(0, 4), (0, 13), (1, 5)]
