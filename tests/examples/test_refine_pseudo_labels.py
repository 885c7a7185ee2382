"""Actions decoded from latents: right where the latent is a linear map of them, and the policy's data as promised."""

from __future__ import annotations

import pytest
import torch
from test_data import make_episode

from examples.demo.data import load_table, tabulate
from examples.demo.probe import ridge_probe
from examples.refine_lam.pseudo_labels import (
    UNLABELLED,
    WithoutState,
    decode_actions,
    label,
    load_demonstrations,
    probe_rows,
    train_on_labels,
)
from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.storage.files import read_json


def make_table(seed: int, episodes: int, steps: int = 12) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    rows = episodes * steps
    low_rank = torch.rand(rows, 6, generator=random) * 2 - 1
    mix = torch.randn(6, 64, generator=torch.Generator().manual_seed(99)) / 12
    return {
        "action": (low_rank @ mix).view(rows, 16, 4),
        "valid": torch.arange(rows) % steps < steps - 2,
        "episode": torch.arange(rows) // steps,
    }


def latents(table: dict[str, torch.Tensor], noise: float, seed: int) -> torch.Tensor:
    mix = torch.randn(64, 20, generator=torch.Generator().manual_seed(7))
    random = torch.Generator().manual_seed(seed)
    z = table["action"].flatten(1) @ mix
    return (1 - noise) * z + noise * torch.randn(z.shape, generator=random)


def test_a_linear_latent_gives_the_actions_back_and_noise_does_not():
    labelled, free = make_table(0, 10), make_table(1, 20)
    rows, truth = free["valid"], free["action"]
    spread = (truth[rows] - truth[rows].mean(0)).square().mean()
    z, new = latents(labelled, 0, 2), latents(free, 0, 3)
    actions, _ = decode_actions(labelled, z, free, new)
    assert (actions[rows] - truth[rows]).square().mean() < 1e-4 * spread
    assert not actions[~rows].any()
    assert ridge_probe(probe_rows(labelled, z), probe_rows(free, new)).r2 > 0.999
    z, new = latents(labelled, 1, 4), latents(free, 1, 5)
    actions, _ = decode_actions(labelled, z, free, new)
    assert (actions[rows] - truth[rows]).square().mean() > 0.9 * spread
    assert ridge_probe(probe_rows(labelled, z), probe_rows(free, new)).r2 < 0.1


def test_the_unlabelled_actions_are_never_read():
    labelled, free = make_table(0, 10), make_table(1, 20)
    hidden = {**free, "action": torch.full_like(free["action"], torch.nan)}
    z, new = latents(labelled, 0.3, 2), latents(free, 0.3, 3)
    assert torch.equal(decode_actions(labelled, z, free, new)[0], decode_actions(labelled, z, hidden, new)[0])


def record(folder, first: int) -> None:
    folder.mkdir()
    torch.save(tabulate([make_episode(40, first), make_episode(36, first + 60)]), folder / "demos.pt")
    torch.save(tabulate([make_episode(34, first + 30)]), folder / "heldout.pt")


@pytest.fixture
def recordings(tmp_path):
    data = [tmp_path / f"data-{task}" for task in range(2)]
    unlabelled = [tmp_path / f"unlabelled-{task}" for task in range(2)]
    for number, folder in enumerate([*data, *unlabelled]):
        record(folder, 10 + 20 * number)
    return {"data": data, "unlabelled": unlabelled}


def test_labelled_and_unlabelled_share_no_distractor(recordings):
    labelled, free, held_out = load_demonstrations(**recordings, distractors=True, seed=3)
    again = load_table(recordings["unlabelled"], "demos", distractors=True, seed=UNLABELLED + 3)
    assert torch.equal(free["image"], again["image"])
    assert not torch.equal(labelled["image"] - labelled["clean"], free["image"] - free["clean"])
    assert len(held_out["valid"]) == 34


def test_the_policy_sees_spoilt_frames_its_labels_and_no_state(recordings, tmp_path, monkeypatch):
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=0))
    lam.save_pretrained(tmp_path / "lam")
    world = {**recordings, "distractors": True, "seed": 0}
    labels = tmp_path / "labels"
    labels.mkdir()
    done = []
    label(labels, done.append, lam=tmp_path / "lam", **world)
    assert done == [1]
    measured = read_json(labels / "measured.json")
    assert {"pseudo_labels", "chunk_probe", "information"} == measured.keys()
    assert measured["pseudo_labels"]["r2"] <= 1
    decoded = torch.load(labels / "labels.pt", weights_only=True)["actions"]

    given = []

    def keep(folder, progress, *, data, distractors, **settings):
        assert settings["lam"] is None
        given.append(load_table(data, "demos", distractors=distractors, seed=0))
        load_table(data, "heldout", distractors=distractors, seed=0)

    monkeypatch.setattr("examples.refine_lam.pseudo_labels.train_policy", keep)
    training = {**world, "steps": 1, "batch": 4, "lr": 1e-3, "execute": 8}
    labelled, free, _ = load_demonstrations(**world)
    count, pairs = len(labelled["valid"]), int(free["valid"].sum())
    for use_unlabelled, source in ((False, None), (True, None), (True, labels)):
        train_on_labels(tmp_path, done.append, labels=source, use_unlabelled=use_unlabelled, **training)
    alone, true, pseudo = given
    assert [len(table["valid"]) for table in given] == [count, count + pairs, count + pairs]
    for table in given:
        assert not table["state"].any()
        assert not table["valid"].any()
    assert torch.equal(true["image"], pseudo["image"])
    assert torch.equal(alone["action"], labelled["action"])
    for task in range(2):
        added = (pseudo["task"] == task).nonzero().squeeze(1)[int((labelled["task"] == task).sum()) :]
        mine = free["valid"] & (free["task"] == task)
        assert torch.equal(pseudo["image"][added], free["image"][mine])
        assert torch.equal(pseudo["action"][added], decoded[mine])
        assert torch.equal(true["action"][added], free["action"][mine])
    assert not (tmp_path / "demos.pt").exists()
    assert not list(tmp_path.glob("tmp*"))


def test_a_policy_without_state_acts_the_same_in_any_state(recordings, tmp_path):
    training = {**recordings, "distractors": False, "seed": 0, "steps": 2, "batch": 4, "lr": 1e-3, "execute": 8}
    out = tmp_path / "policy"
    out.mkdir()
    train_on_labels(out, lambda count: None, labels=None, use_unlabelled=True, **training)
    policy = WithoutState.load(out / "policy.pt")
    seen = {"image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), "task": torch.tensor([0, 1])}
    noise = torch.randn(2, 16, 4)
    action = policy.get_action({**seen, "state": torch.randn(2, 4)}, noise)
    assert torch.equal(action, policy.get_action({**seen, "state": torch.randn(2, 4)}, noise))
    assert policy.config.horizon == 16
