"""What is kept of a source, and what is found out again."""

from __future__ import annotations

import gc
import gzip
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers.scans import made_up_scan
from safetensors.numpy import save

import lara_adapter.data.scan_cache as scan_cache
from lara_adapter import DatasetError
from lara_adapter.data import Gap, Segment, Source
from lara_adapter.data.scan_cache import has_scan, load_scan, read_scan, scan_key

SOURCE = Source(Path("3.mp4"))


def test_a_scan_is_kept(tmp_path, monkeypatch):
    note = "breaks off after 3 s (§ 2)"
    monkeypatch.setattr(
        scan_cache, "scan_source", lambda source, gap: made_up_scan(source, gap)._replace(note=note, turned="90°")
    )
    first, decoded = load_scan(SOURCE, Gap(5), tmp_path)
    assert decoded == len(first.pts) == 331
    again, decoded = load_scan(SOURCE, Gap(5), tmp_path)
    assert decoded == 0
    assert (again.note, again.turned) == (note, "90°")
    assert all(
        np.array_equal(one, other) and one.dtype == other.dtype
        for one, other in zip(first[:-2], again[:-2], strict=True)
    )
    key = scan_key(SOURCE, Gap(5))
    assert has_scan(tmp_path, key)
    path = tmp_path / f"{key}.safetensors.gz"
    content = path.read_bytes()
    for place in range(0, len(content), 97):  # whatever a bad disk makes of it
        path.write_bytes(content[:place] + b"\x00\xff\x00" + content[place + 3 :])
        damaged = read_scan(tmp_path, key)
        assert damaged is None or np.array_equal(damaged.pts, first.pts)  # only gzip's header may differ
        path.write_bytes(content[:place])
        assert read_scan(tmp_path, key) is None


def test_a_failure_is_not_kept(tmp_path, monkeypatch):
    def fail(source, gap):
        raise DatasetError("3.mp4 cannot be opened: the mount is gone")

    monkeypatch.setattr(scan_cache, "scan_source", fail)
    assert load_scan(SOURCE, Gap(5), tmp_path) == ("3.mp4 cannot be opened: the mount is gone", 0)
    assert not list(tmp_path.iterdir())
    (tmp_path / f"{scan_key(SOURCE, Gap(5))}.safetensors.gz").write_bytes(gzip.compress(save({"pts": np.arange(3)})))
    monkeypatch.setattr(scan_cache, "scan_source", made_up_scan)
    assert load_scan(SOURCE, Gap(5), tmp_path)[1] == 331  # what lacks a field is made anew


class _Cycle:
    """Garbage whose end runs Python code, wherever it is collected."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        for _ in range(200):
            pass


def test_scans_are_read_on_many_threads(tmp_path):
    """On Python 3.11 numpy's files are not: two threads that parse their headers fail with SystemError where garbage is
    collected meanwhile (python/cpython#106905)."""
    with mock.patch.object(scan_cache, "scan_source", made_up_scan):
        load_scan(SOURCE, Gap(5), tmp_path)
    key = scan_key(SOURCE, Gap(5))

    def read(_: int) -> bool:
        for _ in range(50):
            _Cycle()
        return read_scan(tmp_path, key) is not None

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(400)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)


def test_what_a_scan_depends_on(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"1")
    one = Source(path)
    episode = Source(path, "episode", (Segment("s#1", 1, 0.0, 1.0, 30),), 30.0, "top", tmp_path, "episode 1")
    different = [
        one, one._replace(path=tmp_path / "b.mp4"), one._replace(fps=10.0), one._replace(inside="b.mp4"), episode,
        episode._replace(inside="episode 2"), episode._replace(column="wrist"),
        episode._replace(segments=(Segment("s#1", 1, 0.0, 1.0, 31),)),
    ]  # fmt: skip
    keys = {scan_key(source, Gap(5)) for source in different} | {scan_key(one, Gap(6)), scan_key(one, Gap(None, 5.0))}
    assert len(keys) == len(different) + 2
    # of a video file all episodes are scanned together
    assert scan_key(one._replace(column="top", segments=episode.segments), Gap(5)) == scan_key(one, Gap(5))
    before = scan_key(one, Gap(5))
    path.write_bytes(b"12")
    assert scan_key(one, Gap(5)) != before
    assert scan_key(Source(tmp_path / "gone", "pictures"), Gap(5))


@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"a\nb.mp4", b"%3A:?.mp4", "²é.mp4".encode()])
def test_any_name_has_a_key(name):
    assert len(scan_key(Source(Path(os.fsdecode(name))), Gap(5))) == 32
