"""Training on video of experts: which rows count, and what decoded actions are worth, where the truth is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from examples.demo import video
from examples.demo.data import EXPERT_VIDEO, HELDOUT_PLAY, HORIZON, SPLITS, split_seed
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import read_json


def table(episodes: int, seed: int) -> dict[str, torch.Tensor]:
    """20 kept frames per episode, each brighter than the one before, with actions that follow from the brightness."""
    g = torch.Generator().manual_seed(seed)
    rows, ahead = 20 * episodes, HORIZON // 2
    episode, row = torch.arange(rows) // 20, torch.arange(rows)
    valid = (row + ahead < rows) & (episode[(row + ahead).clamp_max(rows - 1)] == episode)
    # of 36 frames, of which the last 16 are only for the actions
    level = torch.rand(episodes, 1, generator=g) / 4 + torch.arange(36) / 50
    frame = (255 * level[:, :20].reshape(-1, 1, 1, 1) * torch.ones(1, 3, 64, 64)).to(torch.uint8)
    steps = torch.arange(20)[:, None] + torch.arange(HORIZON) // 2
    action = (2 * level[:, steps] - 1).flatten(0, 1)[..., None].expand(-1, -1, 4).clone()
    return {
        "frame": frame, "state": torch.randn(rows, 4, generator=g), "action": action,
        "action_mask": torch.ones(rows, HORIZON, 4), "episode": episode, "future": torch.where(valid, row + ahead, row),
    }  # fmt: skip


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Folders of demonstrations and of video, of one task, and an untrained LAM."""
    root = tmp_path_factory.mktemp("recordings")
    for name, splits in {"data": ("demos", "heldout"), "video": (EXPERT_VIDEO,)}.items():
        (root / name).mkdir()
        for place, split in enumerate(splits):
            torch.save(table(3, 10 * len(name) + place), root / name / f"{split}.pt")
    torch.manual_seed(0)
    LatentActionModel(LatentActionConfig.tiny()).save_pretrained(root / "lam")
    return root


def train(recordings, folder, labels, **changes):
    folder.mkdir()
    options = {
        "data": [recordings / "data"], "video": [recordings / "video"], "labels": labels, "lam": recordings / "lam",
        "distractors": False, "steps": 2, "batch": 8, "lr": 1e-3, "execute": 8, "seed": 0,
    }  # fmt: skip
    video.train_with_video(folder, lambda count: None, **{**options, **changes})
    return torch.load(folder / "policy.pt", weights_only=True)


def test_arms_differ_in_the_video_alone(recordings, tmp_path):
    weights = {labels: train(recordings, tmp_path / labels, labels) for labels in ("none", "true", "decoded")}
    losses = {labels: read_json(tmp_path / labels / "history.json") for labels in weights}
    # the demonstrations, their noise and the initial weights are the same
    assert len({history["action_loss"][0] for history in losses.values()}) == 1
    assert losses["none"]["video_loss"] == [0, 0]
    assert losses["true"]["video_loss"][0] > 0
    name = next(name for name in weights["none"] if name.endswith("weight"))
    assert not torch.equal(weights["none"][name], weights["true"][name])
    assert not torch.equal(weights["true"][name], weights["decoded"][name])
    assert not (tmp_path / "true/labels.json").exists()
    assert set(read_json(tmp_path / "decoded/labels.json")) == {"r2", "r2_chunk", "r2_ridge", "r2_left_out", "r2_still"}


def test_decoding_does_not_read_the_actions_of_the_video(recordings, tmp_path, monkeypatch):
    known = train(recordings, tmp_path / "known", "decoded")
    load = video.load_table

    def without(folders, split, **options):
        found = load(folders, split, **options)
        if split == EXPERT_VIDEO:
            found["action"] = -found["action"]  # NaN would not be JSON in what the labels are worth
            found["state"] = torch.full_like(found["state"], torch.nan)
        return found

    monkeypatch.setattr(video, "load_table", without)
    blind = train(recordings, tmp_path / "blind", "decoded")
    assert all(torch.equal(known[name], blind[name]) for name in known)


def test_the_worth_of_labels_and_that_a_still_pair_has_it_too(recordings):
    """The actions follow from the present frame: two equal frames say as much of them."""
    demos, free = (
        video.load_table([recordings / folder], split, distractors=False, seed=0)
        for folder, split in (("data", "demos"), ("video", EXPERT_VIDEO))
    )
    labelled, quality = video.label_video(recordings / "lam", demos, free)
    assert quality["r2"] > 0.5
    assert quality["r2_still"] > 0.5
    rows = free["valid"]
    assert (labelled["action"][rows] - free["action"][rows]).abs().mean() < 0.1
    assert labelled["action"].abs().max() <= demos["action"].abs().max()
    assert torch.equal(labelled["action_mask"].flatten(1).all(1), rows)


def test_no_two_recordings_share_starts():
    kinds = [*SPLITS, HELDOUT_PLAY, EXPERT_VIDEO]
    numbers = [split_seed(kind, seed) for kind in kinds for seed in range(100)]
    assert len(set(numbers)) == len(numbers)
