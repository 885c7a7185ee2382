"""The order of the pairs of a collection that is indexed whole, pinned: runs of earlier releases go on in it."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from helpers.scans import made_up_frames, made_up_scan, made_up_sources

import lara_adapter.data.pairs as pairs_module
import lara_adapter.data.scan_cache as scan_cache
from lara_adapter.data import IndexSettings, PairStream, build_index
from lara_adapter.data.pairs import read_pairs


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Indexed sources of made-up files: each is a video, or one with that many episodes."""
    monkeypatch.setattr(scan_cache, "scan_source", made_up_scan)
    monkeypatch.setattr(pairs_module, "read_frames", made_up_frames)

    def index(episodes):
        return build_index(made_up_sources(tmp_path, episodes), IndexSettings(held_out=0.2), tmp_path / "index")

    return index


def digest(stream, batches, start=0):
    taken = stream.batches(start)
    rows = [(batch.epoch, batch.where, batch.present, batch.future) for batch in itertools.islice(taken, batches)]
    taken.close()
    text = repr([(epoch, *(tensor.tolist() for tensor in tensors)) for epoch, *tensors in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


EARLIER = {  # ranks, rank, chain, shuffle_frames -> of two epochs, of 9 batches from number 31 on
    (1, 0, 1, 400): ("3e3aa80862fd", "ea24cca5c954"),
    (1, 0, 4, 10**6): ("1c5fbdc123d3", "953f3239c3d2"),
    (2, 1, 4, 700): ("54459fc589ae", "7651bdeeb5c8"),
    (3, 2, 2, 100): ("4ee9e4345d1b", "5ddf0c005669"),
}


def test_the_order_is_that_of_earlier_releases(make):
    index = make([0, 0, 3, 0, 0, 0, 5, 0, 0, 0])
    assert index.report == {
        "sources": 10, "usable": 10, "frames": 4765, "pairs": 3636, "held_out_pairs": 74, "cuts": 20,
        "still_pairs": 967, "still_pairs_left_out": 872, "faults": [],
    }  # fmt: skip
    for (ranks, rank, chain, frames), expected in EARLIER.items():
        stream = PairStream(
            index.sources, 4, 16, seed=3, rank=rank, ranks=ranks, chain=chain, shuffle_frames=frames, workers=1
        )
        assert (digest(stream, 2 * stream.pairs // 16 // ranks), digest(stream, 9, 31)) == expected
    held_out = [int(number) for present, _ in read_pairs(index.sources, 4, 12, 5) for number in present[:, 0, 0, 0]]
    assert held_out == [245, 0, 7, 13, 20, 27, 33, 40, 47, 98, 105, 112]


def test_of_a_single_video_too(make):
    index = make([0, 0, 0, 0])
    assert (index.report["pairs"], index.report["held_out_pairs"]) == (567, 26)
    assert digest(PairStream(index.sources[3:], 4, 8, seed=1, shuffle_frames=200), 40) == "bc0dcc80e4f8"
    index = make([4])  # its end is held out
    assert (index.report["pairs"], index.report["held_out_pairs"]) == (10, 5)
    assert digest(PairStream(index.sources, 4, 2), 30) == "7ec77110de67"
