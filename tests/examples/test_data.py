from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.demo.data import HORIZON, batches, distractor_seeds, load_table, tabulate
from examples.metaworld_sim import FRAME_SKIP, Distractors, Episode, GLMissing, add_distractors, find_gl


def make_episode(length: int, value: int, success: bool = True) -> Episode:
    kept = -(-length // FRAME_SKIP)
    frames = np.full((kept, 3, 64, 64), value, dtype=np.uint8) + np.arange(kept, dtype=np.uint8)[:, None, None, None]
    steps = np.arange(length, dtype=np.float32)
    return Episode(frames, np.tile(steps[:, None], 4), np.tile(steps[:, None] / 100, 4), success)


@pytest.fixture
def recordings(tmp_path):
    folders = []
    for task in range(2):
        folder = tmp_path / f"record-{task}"
        folder.mkdir()
        torch.save(tabulate([make_episode(40, 10), make_episode(23, 100)]), folder / "demos.pt")
        folders.append(folder)
    return folders


def test_distractors_depend_on_their_seed_alone():
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    kept = frames.copy()
    once = add_distractors(frames, range(5))
    assert np.array_equal(once, add_distractors(frames, range(5)))
    assert np.array_equal(frames, kept)
    # the same frame in another batch, at another place
    assert np.array_equal(once[3], add_distractors(frames[[3, 1]], [3, 1])[0])
    assert not np.array_equal(once[0], add_distractors(frames[:1], [7])[0])


def test_distractors_are_as_promised():
    grey = np.full((1, 3, 64, 64), 100, dtype=np.uint8)
    gains, places = [], set()
    for seed in range(200):
        drawn = Distractors.draw(seed)
        gains.append(drawn.gain)
        places.update(drawn.squares)
        assert len(drawn.squares) == 2
        assert all(10 <= side <= 21 and top + side <= 64 and left + side <= 64 for top, left, side in drawn.squares)
        frame, mask = add_distractors(grey, [seed])[0], drawn.mask()
        assert (frame[:, ~mask] == int(100 * drawn.gain)).all()
        covered = sum(side * side for _, _, side in drawn.squares)
        assert 100 <= mask.sum() <= covered
    assert 0.75 <= min(gains) < 0.78
    assert 1.22 < max(gains) <= 1.25
    assert len(places) > 380


def test_rows_hold_the_chunk_its_mask_and_the_frame_16_steps_later():
    table = tabulate([make_episode(40, 10), make_episode(23, 100)])
    assert len(table["frame"]) == 20 + 12
    assert torch.equal(table["action"][3, :, 0], (6 + torch.arange(16.0)) / 100)
    assert table["action_mask"][3].all()
    # row 14 is step 28 of 40: 12 actions are left
    assert table["action_mask"][14, :, 0].tolist() == [1.0] * 12 + [0.0] * 4
    assert (table["action"][14, 12:] == 0).all()
    ahead = HORIZON // FRAME_SKIP
    assert table["future"][3] == 3 + ahead
    assert table["future"][20] == 20 + ahead  # second episode, its own frames
    assert table["future"][19] == 19  # no frame 16 steps later: itself, and not a frame of the next episode
    assert table["episode"].tolist() == [0] * 20 + [1] * 12


def test_pairs_never_cross_episodes_or_tasks(recordings):
    table = load_table(recordings, "demos", distractors=False, seed=0)
    future = table["future"]
    assert torch.equal(table["episode"][future], table["episode"])
    assert torch.equal(table["task"][future], table["task"])
    assert torch.equal(table["valid"], future != torch.arange(len(future)))
    assert (table["state"][future][table["valid"]] - table["state"][table["valid"]] == HORIZON).all()
    assert table["episode"].unique().tolist() == [0, 1, 2, 3]
    # a full chunk of actions belongs to every pair
    assert table["action_mask"][table["valid"]].all()


@pytest.mark.parametrize("gap", [4, 8, 32])
def test_another_gap_makes_other_pairs_within_the_episodes(recordings, gap):
    table = load_table(recordings, "demos", distractors=False, seed=0, gap=gap)
    assert torch.equal(table["episode"][table["future"]], table["episode"])
    assert (table["state"][table["future"]][table["valid"]] - table["state"][table["valid"]] == gap).all()
    last = [int((table["episode"] == episode).nonzero()[-1]) for episode in range(4)]
    assert not table["valid"][last].any()
    usual = load_table(recordings, "demos", distractors=False, seed=0)
    assert (table["valid"].sum() > usual["valid"].sum()) == (gap < HORIZON)


def test_the_first_episodes_of_each_task(recordings):
    every, some = (load_table(recordings, "demos", distractors=False, seed=0, first=first) for first in (None, 1))
    assert some["episode"].unique().tolist() == [0, 1]  # one of each task, numbered anew
    assert some["task"].unique().tolist() == [0, 1]
    kept = torch.isin(every["episode"], torch.tensor([0, 2]))
    assert torch.equal(some["clean"], every["clean"][kept])
    assert torch.equal(some["episode"][some["future"]], some["episode"])


def test_batches_are_the_same_for_every_arm(recordings):
    table = load_table(recordings, "demos", distractors=True, seed=0)
    first, again, other = (list(batches(table, 16, 6, seed)) for seed in (0, 0, 1))
    for a, b in zip(first, again):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(first[0]["state"], other[0]["state"])
    assert first[0]["lara_frames"].shape == (16, 2, 3, 64, 64)
    assert torch.equal(first[0]["lara_frames"][:, 0], first[0]["image"])
    assert all(batch["lara_frames_valid"].all() for batch in batches(table, 16, 6, 0, pairs_only=True))
    seen = torch.cat([batch["state"][:, 0] for batch in batches(table, 16, 4, 0)])
    assert torch.equal(seen.sort().values, table["state"][:, 0].sort().values)  # 64 rows: one full round


def test_frames_are_spoilt_in_the_same_way_in_every_stage(recordings):
    table = load_table(recordings, "demos", distractors=True, seed=3)
    again = load_table(recordings, "demos", distractors=True, seed=3)
    assert torch.equal(table["image"], again["image"])
    seeds = distractor_seeds("demos", 3, len(table["image"]))
    assert np.array_equal(table["image"][5].numpy(), add_distractors(table["clean"][5:6].numpy(), seeds[5:6])[0])
    assert not set(seeds) & set(distractor_seeds("heldout", 3, len(seeds)))


def test_without_gl_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lara_adapter.integrations.simulators.gl._gl_works", lambda name: False)
    with pytest.raises(GLMissing, match="apt-get install -y libegl1"):
        find_gl(install=False)
