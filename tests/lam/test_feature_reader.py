"""Cached features read by a data loader's workers: the same losses, without the encoder; and what is not known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.toys import DitPolicy, make_batch
from test_encoders import REST, mae
from test_feature_cache import build, calls
from torch.utils.data import DataLoader, default_collate

from benchmarks.speed.counts import count
from lara_adapter import FrameError, LaraArgumentError, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.lam import feature_reader
from lara_adapter.lam.image_encoder import describe_image_encoder
from lara_adapter.lam.pixels import unit

pytest.importorskip("transformers")

FEATURES = "lara_frames_features"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "mae"
    torch.manual_seed(0)
    mae(folder)
    return folder


def samples(count=8, views=None, last_valid=True):
    """Samples of a dataset; of the last pair the future frame may be missing."""
    batch = {**make_batch(count), "lara_frames_valid": torch.arange(count) < count - (not last_valid)}
    shape = (count, 2, 3, 32, 32) if views is None else (count, views, 2, 3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    batch["lara_frames"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def fill(lam, rows):
    """Every frame of a dataset into the cache."""
    with torch.no_grad():
        for row in rows:
            frames = row["lara_frames"].reshape(-1, 2, 3, 32, 32)
            lam.encode(frames[:, 0], frames[:, 1])


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_bring_what_the_encoder_gives(encoder, tmp_path, way):
    lam, rows = build(encoder), samples()
    cache = lam.cache_features(tmp_path)
    fill(lam, rows)
    seen = calls(lam)
    loader = DataLoader(
        rows, batch_size=2, collate_fn=lam.prefetch_features(), num_workers=2, multiprocessing_context=way
    )
    for batch in loader:
        frames = batch["lara_frames"]
        assert batch[FEATURES].shape == (2, 1, 2, 17, 32)
        assert batch[FEATURES].is_shared()
        brought = lam.encode(frames[:, 0], frames[:, 1], features=batch[FEATURES][:, 0]).continuous
        assert torch.equal(brought, lam.encode(frames[:, 0], frames[:, 1]).continuous)
    assert seen == []
    assert cache.prefetched == 16


def test_the_step_neither_hashes_nor_reads(encoder, tmp_path):
    lam, rows = build(encoder), samples(4)
    lam.cache_features(tmp_path)
    fill(lam, rows)
    batch = lam.prefetch_features()(rows)
    pair, features = batch["lara_frames"].unbind(1), batch[FEATURES][:, 0]
    found, brought = (
        count(lambda given=given: lam.encode(*pair, **given))[0] for given in ({}, {"features": features})
    )
    assert found.synchronisations >= 1
    assert brought.synchronisations == 0
    assert brought.allocated < found.allocated


def test_a_batch_with_a_frame_that_is_not_known_goes_the_ordinary_way(encoder, tmp_path, monkeypatch):
    lam, rows = build(encoder), samples()
    lam.cache_features(tmp_path)
    collate = lam.prefetch_features()
    assert FEATURES not in collate(rows[:4])  # there is no file yet
    fill(lam, rows[:3])
    assert FEATURES in collate(rows[:3])
    assert FEATURES not in collate(rows[:4])
    fill(lam, rows[3:4])  # as the step of that batch does
    assert FEATURES not in collate(rows[:4])  # the files are not looked at for each batch
    monkeypatch.setattr(feature_reader, "_LOOK_AGAIN", 0.0)
    assert FEATURES in collate(rows[:4])


def test_rows_of_several_processes_are_found_while_they_write(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_reader, "_LOOK_AGAIN", 0.0)
    first, second, rows = build(encoder), build(encoder), samples()
    first.cache_features(tmp_path)
    second.cache_features(tmp_path)
    collate = first.prefetch_features()
    for number in range(4):
        fill(first, rows[2 * number : 2 * number + 1])
        assert FEATURES not in collate(rows[2 * number : 2 * number + 2])
        fill(second, rows[2 * number + 1 : 2 * number + 2])
        brought = collate(rows[: 2 * number + 2])[FEATURES]
        images = unit(torch.stack([row["lara_frames"] for row in rows[: 2 * number + 2]]).flatten(0, 1))
        torch.testing.assert_close(brought.flatten(0, 2), first.image_encoder.compute(images), rtol=1e-5, atol=1e-5)


def test_pairs_that_do_not_count_are_not_looked_up(encoder, tmp_path):
    lam, rows = build(encoder), samples(4, last_valid=False)
    lam.cache_features(tmp_path)
    fill(lam, rows[:3])
    batch = lam.prefetch_features()(rows)
    frames, valid = batch["lara_frames"], batch["lara_frames_valid"]
    assert not batch[FEATURES][3].any()
    assert batch[FEATURES][:3].any(-1).all()
    without = lam(frames[:, 0], frames[:, 1], valid).loss
    torch.testing.assert_close(lam(frames[:, 0], frames[:, 1], valid, features=batch[FEATURES][:, 0]).loss, without)
    nothing = [{**row, "lara_frames_valid": torch.tensor(False)} for row in rows]
    assert FEATURES not in lam.prefetch_features()(nothing)


@pytest.mark.parametrize(("difference", "still"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("train_lam", [True, False])
def test_a_policy_trains_on_them_as_on_the_encoder(encoder, tmp_path, difference, still, train_lam):
    """Two views; the policy never sees the features."""
    rows = samples(4, views=2, last_valid=False)
    described = describe_image_encoder(str(encoder))
    losses, gradients = [], []
    for step, prefetched in enumerate((False, True)):
        torch.manual_seed(0)
        lam = LatentActionModel(
            LatentActionConfig(**described, **REST, difference_input=difference, subtract_still=still)
        )
        cache = lam.cache_features(tmp_path)
        policy = DitPolicy()
        lara = attach_lara(policy, lam, train_lam=train_lam, lam_weight=1.0, align_weight=1.0)
        policy.train()
        seen, reached, own = calls(lam), set(), policy.loss_of
        policy.loss_of = lambda batch, own=own, reached=reached: (reached.update(batch), own(batch))[1]
        batch = (lam.prefetch_features() if prefetched else default_collate)(rows)
        assert (FEATURES in batch) == prefetched
        torch.manual_seed(1)
        loss = policy(batch)["loss"]
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        assert reached == {"state", "action", "action_mask"}
        images = 3 if difference else 2
        assert cache.prefetched == (4 * 2 * images if step else 0)
        if prefetched:
            assert seen == []
            assert lara.check(batch).ok
    torch.testing.assert_close(*losses)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_check_finds_features_of_other_frames(encoder, tmp_path):
    lam, rows = build(encoder), samples(4)
    lam.cache_features(tmp_path)
    fill(lam, rows)
    batch = lam.prefetch_features()(rows)
    policy = DitPolicy()
    lara = attach_lara(policy, lam)
    assert lara.check(batch).ok
    problems = lara.check({**batch, "lara_frames": batch["lara_frames"].flip(-1)}).problems
    assert len(problems) == 1
    assert "not those of its frames" in problems[0]


def test_bfloat16_autocast_has_features_of_its_own(encoder, tmp_path):
    lam, rows = build(encoder), samples(4)
    lam.cache_features(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        fill(lam, rows)
    assert FEATURES not in lam.prefetch_features()(rows)
    batch = lam.prefetch_features(dtype=torch.bfloat16)(rows)
    assert batch[FEATURES].dtype == torch.bfloat16
    frames = batch["lara_frames"]
    with torch.autocast("cpu", torch.bfloat16):
        brought = lam.encode(frames[:, 0], frames[:, 1], features=batch[FEATURES][:, 0]).continuous
        assert torch.equal(brought, lam.encode(frames[:, 0], frames[:, 1]).continuous)


def test_other_batches(encoder, tmp_path):
    """A batch inside a batch, arrays, samples that are collated later, none at all, and frames that the LAM resizes."""
    lam, rows = build(encoder), samples(4)
    lam.cache_features(tmp_path)
    fill(lam, rows)
    whole = lam.prefetch_features()(rows)[FEATURES]
    inside = lam.prefetch_features(lambda samples: {"inputs": default_collate(samples)})(rows)
    assert torch.equal(inside["inputs"][FEATURES], whole)
    arrays = lam.prefetch_features(lambda s: {key: np.stack([r[key] for r in s]) for key in list(s[0])[-2:]})(rows)
    assert torch.equal(arrays[FEATURES], whole)
    reader = lam.prefetch_features()
    assert torch.equal(default_collate(reader.add_to(rows))[FEATURES], whole)
    bare = [{"action": row["action"]} for row in rows]
    assert set(reader(bare)) == {"action"}
    assert reader.add_to(bare) == bare
    assert reader.add_to([*rows, *samples(5)[4:]])[0].keys() == rows[0].keys()


def test_frames_of_another_size_are_left_to_the_step(encoder, tmp_path, caplog):
    lam, rows = build(encoder), samples(2)
    lam.cache_features(tmp_path)
    fill(lam, rows)
    collate = lam.prefetch_features()
    large = [{**row, "lara_frames": row["lara_frames"].repeat_interleave(2, -1)} for row in rows]
    for _ in range(2):
        assert FEATURES not in collate(large)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "frame_size=32" in caplog.text


def test_what_is_wrong_is_said(encoder, tmp_path):
    lam = build(encoder)
    with pytest.raises(LaraArgumentError, match=r"call cache_features\(folder\) first"):
        lam.prefetch_features()
    lam.cache_features(tmp_path)
    frames = torch.zeros(2, 3, 32, 32)
    with pytest.raises(FrameError, match=r"\[2, 2, 16, 32\], but floats \[2, 2, 17, 32\] are expected"):
        lam.encode(frames, frames, features=torch.zeros(2, 2, 16, 32))
    small = LatentActionModel(LatentActionConfig.tiny(image_size=32))
    with pytest.raises(LaraArgumentError, match="features: this LAM has no frozen image encoder"):
        small.encode(frames, frames, features=torch.zeros(2, 2, 17, 32))


def test_pixels_are_divided_and_not_multiplied():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = (np.arange(256, dtype=np.float32) / np.float32(255)).tolist()
    assert unit(levels).tolist() == expected
    assert torch.full((), 255.0).reciprocal().mul(levels.float()).tolist() != expected  # what CUDA does with a number
