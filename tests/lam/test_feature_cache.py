"""The cache of a frozen image encoder's features: the same losses, on disk, shared, damaged, bounded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.toys import DitPolicy, make_batch
from test_encoders import REST, mae

from benchmarks.speed.counts import count
from lara_adapter import AdapterFormatError, LaraArgumentError, LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.lam import feature_cache
from lara_adapter.lam.image_encoder import describe_image_encoder

pytest.importorskip("transformers")


@pytest.fixture
def encoder(tmp_path):
    mae(tmp_path / "mae")
    return tmp_path / "mae"


def build(encoder):
    torch.manual_seed(0)
    return LatentActionModel(LatentActionConfig(**describe_image_encoder(str(encoder)), **REST)).train()


def frames(seed=0, batch=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2)]


def calls(lam):
    """How many images the backbone is given from now on."""
    seen = []
    original = lam.image_encoder.compute
    lam.image_encoder.compute = lambda images: (seen.append(len(images)), original(images))[1]
    return seen


def losses(lam, steps=6):
    out = []
    optimizer = torch.optim.AdamW(lam.parameters(), lr=1e-3)
    for step in range(steps):
        loss = lam(*frames(step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_training_with_the_cache_has_the_same_losses_and_skips_the_encoder(encoder, tmp_path):
    plain = losses(build(encoder))
    lam = build(encoder)
    cache = lam.cache_features(tmp_path / "cache")
    seen = calls(lam)
    assert losses(lam) == plain
    assert seen == [8, 8]  # two batches of four pairs; four more epochs are read
    assert (cache.hits, cache.misses) == (32, 16)
    assert cache.bytes_written == 16 * 17 * 32 * 4


def test_a_later_process_reads_the_files_of_an_earlier_one(encoder, tmp_path):
    first = build(encoder)
    first.cache_features(tmp_path / "cache")
    expected = losses(first)
    lam = build(encoder)
    lam.cache_features(tmp_path / "cache")
    seen = calls(lam)
    assert losses(lam) == expected
    assert seen == []


def test_partly_known_batches_and_repeated_frames(encoder, tmp_path):
    plain, lam = build(encoder).eval(), build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    seen = calls(lam)
    a, b = frames(0)
    c, _ = frames(1)
    lam.encode(a, b)
    mixed = torch.cat([a[:2], c[:1], c[:1], b[3:]]), torch.cat([c[:1], a[3:], b[:1], b[:1], c[1:2]])
    torch.testing.assert_close(lam.encode(*mixed).continuous, plain.encode(*mixed).continuous, rtol=1e-5, atol=1e-6)
    assert seen == [8, 2]  # of ten frames two are new, one of them three times


def test_the_key_is_of_the_pixels_and_their_order(encoder, tmp_path):
    lam = build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    seen = calls(lam)
    image = frames()[0][:1]
    changed = image.clone()
    changed[0, 0, 0, 0] ^= 1
    for other in (image, changed, image.flip(-1), image.flip(1), image.transpose(-1, -2)):
        lam.encode(other, other)
    assert seen == [1] * 5  # each pair is one frame twice


def test_another_encoder_or_precision_has_files_of_its_own(encoder, tmp_path):
    lam = build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    lam.encode(*frames())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = lam.encode(*frames()).continuous
        plain = build(encoder).eval().encode(*frames()).continuous
    assert torch.equal(half, plain)
    torch.manual_seed(9)
    mae(tmp_path / "other")
    other = build(tmp_path / "other").eval()
    other.cache_features(tmp_path / "cache")
    seen = calls(other)
    other.encode(*frames())
    assert seen == [8]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_bfloat16_halves_the_space(encoder, tmp_path):
    lam, plain = build(encoder).eval(), build(encoder).eval()
    cache = lam.cache_features(tmp_path / "cache", dtype=torch.bfloat16)
    lam.encode(*frames())
    found = lam.encode(*frames()).continuous
    assert cache.bytes_written == 8 * 17 * 32 * 2
    exact = plain.encode(*frames()).continuous
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.02)


def test_under_autocast_half_the_space_holds_the_same_bits(encoder, tmp_path):
    """A linear layer reads the features, and would round them so in any case."""

    def train(folder):
        lam = build(encoder)
        cache = lam.cache_features(folder)
        optimizer = torch.optim.AdamW(lam.parameters(), lr=1e-3)
        out = []
        for step in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                loss = lam(*frames(step % 2)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out, cache

    found, cache = train(tmp_path / "cache")
    assert found == train(None)[0]
    assert cache.bytes_written == 16 * 17 * 32 * 2
    assert cache.hit_rate == pytest.approx(32 / 48)


def test_a_row_that_is_found_is_copied_once_and_goes_to_the_device_once(encoder, tmp_path):
    lam = build(encoder).eval()
    cache = lam.cache_features(tmp_path / "cache")
    lam.encode(*frames())
    images = torch.cat(frames()).float().div(255)
    found, operations = count(lambda: lam.image_encoder(images))
    hashing = count(lambda: feature_cache.pixel_keys(images))[0].allocated
    assert cache.hits == 8
    assert found.allocated - hashing == 8 * 17 * 32 * 4
    assert "cat" not in operations


def test_the_log_says_how_many_are_found_and_how_large_it_is(encoder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(feature_cache, "_FIRST_LINE", 16)
    lam = build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    with caplog.at_level("INFO"):
        for _ in range(8):
            lam.encode(*frames())
    lines = [record.getMessage() for record in caplog.records if "were in it" in record.getMessage()]
    assert [line.partition(": ")[2] for line in lines] == [
        "8 frames, 0.0 GB; 50.0 % of the last 16 were in it",
        "8 frames, 0.0 GB; 75.0 % of the last 32 were in it",
        "8 frames, 0.0 GB; 87.5 % of the last 64 were in it",
    ]


def test_a_damaged_row_is_refused(encoder, tmp_path):
    lam = build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    lam.encode(*frames())
    (features,) = (tmp_path / "cache").rglob("*.features")
    content = bytearray(features.read_bytes())
    content[100] ^= 1
    features.write_bytes(content)
    again = build(encoder).eval()
    again.cache_features(tmp_path / "cache")
    with pytest.raises(AdapterFormatError, match=r"checksum.*remove the folder"):
        again.encode(*frames())


@pytest.mark.parametrize("cut", [1, 21, 39, 10_000])
def test_a_killed_writer_leaves_whole_rows(encoder, tmp_path, cut):
    lam = build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    lam.encode(*frames())
    (index,) = (tmp_path / "cache").rglob("*.index")
    index.write_bytes(index.read_bytes()[:-cut] if cut < 160 else b"")
    again = build(encoder).eval()
    again.cache_features(tmp_path / "cache")
    seen = calls(again)
    again.encode(*frames())
    assert seen == [min(8, -(-cut // 20))]


def test_the_bound_and_a_full_disk_stop_the_writing_and_not_the_training(encoder, tmp_path, caplog, monkeypatch):
    lam = build(encoder)
    cache = lam.cache_features(tmp_path / "cache", max_gb=3 * 17 * 32 * 4 / 1e9)
    plain = losses(build(encoder))
    torch.testing.assert_close(torch.tensor(losses(lam)), torch.tensor(plain), rtol=1e-4, atol=1e-5)
    assert cache.bytes_written == 3 * 17 * 32 * 4
    assert caplog.text.count("no more frames are kept") == 1

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache._Writer, "add", full)
    lam = build(encoder)
    lam.cache_features(tmp_path / "full")
    assert losses(lam) == plain
    assert "No space left" in caplog.text


def test_growing_beyond_one_map(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_GROW", 3)
    lam, plain = build(encoder).eval(), build(encoder).eval()
    lam.cache_features(tmp_path / "cache")
    for _ in range(2):
        for seed in range(5):
            assert torch.equal(lam.encode(*frames(seed)).continuous, plain.encode(*frames(seed)).continuous)


def test_copies_pickles_and_off(encoder, tmp_path):
    lam = build(encoder).eval()
    cache = lam.cache_features(tmp_path / "cache")
    lam.encode(*frames())
    assert copy.deepcopy(lam).image_encoder.cache is cache
    loaded = pickle.loads(pickle.dumps(cache))
    seen = calls(lam)
    lam.image_encoder.cache = loaded
    lam.encode(*frames())
    assert seen == []
    assert lam.cache_features(None) is None
    lam.encode(*frames())
    assert seen == [8]
    assert not any("cache" in name for name in lam.state_dict())


def test_a_lam_whose_encoder_trains_is_refused(tmp_path):
    with pytest.raises(LaraArgumentError, match="frozen image encoder"):
        LatentActionModel(LatentActionConfig.tiny()).cache_features(tmp_path)


def test_joint_training_with_a_policy_is_the_same(encoder, tmp_path):
    def train(folder):
        lam = build(encoder)
        lam.cache_features(folder)
        torch.manual_seed(1)
        policy = DitPolicy().train()
        attach_lara(policy, lam, align_weight=0.3, lam_weight=0.2)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        out = []
        for step in range(6):
            batch = make_batch(seed=step % 2)
            optimizer.zero_grad()
            torch.manual_seed(step)
            loss = policy(batch)["loss"]
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    assert train(tmp_path / "cache") == train(None)


def _two_writers(rank, encoder, folder):
    lam = build(encoder).eval()
    lam.cache_features(folder)
    for seed in (rank, 5, rank):
        lam.encode(*frames(seed))
    return lam.encode(*frames(5)).continuous.detach().numpy()


def test_ranks_share_a_folder(encoder, tmp_path):
    first, second = run_ranks(_two_writers, str(encoder), str(tmp_path / "cache"))
    assert (first == second).all()
    lam = build(encoder).eval()
    cache = lam.cache_features(tmp_path / "cache")
    seen = calls(lam)
    for seed in (0, 1, 5):
        lam.encode(*frames(seed))
    assert seen == []
    assert cache.hits == 24
