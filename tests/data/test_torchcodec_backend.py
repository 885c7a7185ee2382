"""Reading with torchcodec: the real one where it is installed; and where it is not, or gives something else than asked."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from helpers.videos import number_of, numbered, png, square, write_video
from test_video import FORMATS

from lara_adapter import DatasetError
from lara_adapter.data import IndexSettings, PairStream, Source, build_index
from lara_adapter.data.decode import read_frames
from lara_adapter.data.gap import Gap
from lara_adapter.data.scan import scan_source
from lara_adapter.data.torchcodec_backend import read_by_time, require_torchcodec
from lara_adapter.data.video import VideoFile


def _usable():
    try:
        require_torchcodec()
    except DatasetError as error:
        return str(error)
    return ""


needs_torchcodec = pytest.mark.skipif(bool(_usable()), reason=_usable())


def standing_in(monkeypatch, frames_played_at):
    """A torchcodec whose decoder answers as `frames_played_at(seconds)` says; returns the calls."""
    calls = []

    class VideoDecoder:
        metadata = types.SimpleNamespace(rotation=None)

        def __init__(self, path, **options):
            calls.append((path, options))

        def get_frames_played_at(self, seconds):
            data, times = frames_played_at(seconds)
            return types.SimpleNamespace(data=torch.from_numpy(data), pts_seconds=torch.tensor(times).double())

    decoders, transforms = types.ModuleType("torchcodec.decoders"), types.ModuleType("torchcodec.transforms")
    decoders.VideoDecoder, transforms.Resize = VideoDecoder, lambda size: ("resize", size)
    for name, module in (("", types.ModuleType("torchcodec")), (".decoders", decoders), (".transforms", transforms)):
        monkeypatch.setitem(sys.modules, f"torchcodec{name}", module)
    return calls


@pytest.fixture
def clip(tmp_path):
    source = Source(write_video(tmp_path / "a.mp4", numbered(40), "libx264", g=8, bf=2))
    scan = scan_source(source, Gap(5))
    return source, scan.pts, np.flatnonzero(scan.key)


@needs_torchcodec
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_frames_as_av(tmp_path, name):
    codec, options = FORMATS[name]
    source = Source(write_video(tmp_path / name, numbered(61), codec, **options))
    scan = scan_source(source, Gap(5))
    keys = np.flatnonzero(scan.key)
    for first in range(0, 54, 6):
        wanted = np.array([first, first + 1, first + 7])
        read = read_frames(source, scan.pts, keys, wanted, 64, "torchcodec")
        assert [number_of(frame)[1] for frame in read] == wanted.tolist()
        difference = np.abs(read.astype(int) - read_frames(source, scan.pts, keys, wanted, 64).astype(int))
        assert difference.mean() < 2  # of 255: they scale in different colour spaces


@needs_torchcodec
def test_torchcodec_reads_the_frames(clip):
    source, pts, keys = clip
    wanted = np.arange(3, 30)
    direct = read_by_time(source.path, pts[wanted], VideoFile(source.path).tick, 48)
    assert direct is not None
    assert (read_frames(source, pts, keys, wanted, 48, "torchcodec") == direct).all()


@needs_torchcodec
def test_a_rate_that_varies_and_pairs_of_a_stream(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([0.02, 0.05, 0.3], 60))
    write_video(tmp_path / "v" / "a.mkv", numbered(60), "libx264", times=times, g=10)
    write_video(tmp_path / "v" / "b.mp4", square(60), "libx264", g=10)
    sources = [Source(tmp_path / "v" / name) for name in ("a.mkv", "b.mp4")]
    clips = build_index(sources, IndexSettings(gap=Gap(4), held_out=0, still_keep=1), tmp_path / "index").sources
    batches = PairStream(clips, 32, 16, shuffle_frames=64, decoder="torchcodec").batches()
    for _ in range(6):
        batch = next(batches)
        for (video, start), frame in zip(batch.where.tolist(), batch.pair()[1]):
            if video == 0:
                assert number_of(frame)[1] == start + 4
    batches.close()


@needs_torchcodec
def test_a_damaged_stretch_is_left_to_av(tmp_path):
    path = write_video(tmp_path / "a.mp4", square(90), "libx264", g=10)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 400] = bytes(400)
    path.write_bytes(content)
    source = Source(path)
    scan = scan_source(source, Gap(5))
    whole = np.arange(len(scan.pts))
    read = read_frames(source, scan.pts, np.flatnonzero(scan.key), whole, 32, "torchcodec")
    assert read.shape == (len(whole), 32, 32, 3)


def test_frames_are_requested_by_time_and_used(clip, monkeypatch):
    source, pts, keys = clip
    tick = VideoFile(source.path).tick
    marked = np.full((3, 16, 16, 3), 7, np.uint8)
    calls = standing_in(monkeypatch, lambda seconds: (marked, [second - tick / 2 for second in seconds]))
    read = read_frames(source, pts, keys, np.array([4, 5, 9]), 16, "torchcodec")
    assert (read == 7).all()
    assert calls[0][0] == str(source.path)
    assert calls[0][1]["transforms"] == [("resize", (16, 16))]
    assert (read_frames(source, pts, keys, np.array([4, 5, 9]), 16) != 7).any()
    assert len(calls) == 1  # unasked it is not used


@pytest.mark.parametrize("wrong", ["times", "count", "size", "type", "raises"])
def test_frames_of_other_times_or_none_are_left_to_av(clip, monkeypatch, wrong):
    source, pts, keys = clip

    def answer(seconds):
        if wrong == "raises":
            raise RuntimeError("no more frames")
        shape = {"count": (2, 16, 16, 3), "size": (3, 8, 8, 3)}.get(wrong, (3, 16, 16, 3))
        late = 1 / 30 if wrong == "times" else 0
        kind = np.float32 if wrong == "type" else np.uint8
        return np.zeros(shape, kind), [second + late for second in seconds][: shape[0]]

    calls = standing_in(monkeypatch, answer)
    wanted = np.array([4, 5, 9])
    read = read_frames(source, pts, keys, wanted, 16, "torchcodec")
    assert calls
    assert (read == read_frames(source, pts, keys, wanted, 16)).all()
    assert [number_of(frame)[1] for frame in read] == [4, 5, 9]


def test_pictures_and_files_without_time_stamps_are_read_by_av(tmp_path, monkeypatch):
    calls = standing_in(monkeypatch, lambda seconds: pytest.fail("it was asked"))
    for number, frame in enumerate(numbered(4)):
        (tmp_path / f"{number}.png").write_bytes(png(frame))
    pictures = Source(tmp_path, "pictures", fps=10)
    video = Source(write_video(tmp_path / "unordered.avi", numbered(20), "libx264"))
    for source in (pictures, video):
        scan = scan_source(source, Gap(2))
        read = read_frames(source, scan.pts, np.flatnonzero(scan.key), np.array([1, 3]), 32, "torchcodec")
        assert [number_of(frame)[1] for frame in read] == [1, 3]
    assert not calls


@pytest.mark.parametrize("trouble", ["absent", "no FFmpeg"])
def test_the_error_says_what_torchcodec_needs(clip, monkeypatch, trouble):
    if trouble == "absent":
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    else:

        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise RuntimeError("Could not load libtorchcodec.\n  Likely causes:\n" + "FFmpeg version 8: no\n" * 40)

        monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    source, pts, keys = clip
    with pytest.raises(DatasetError, match=r"pip install torchcodec.*FFmpeg.*decoder='av'") as caught:
        read_frames(source, pts, keys, np.array([4]), 16, "torchcodec")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
