"""Reading frames: any container and codec, from the middle as from the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from helpers.videos import abandon_decoders, number_of, numbered, png, square, write_audio, write_video

from lara_adapter import DatasetError
from lara_adapter.data import Source
from lara_adapter.data.decode import decode_all, read_frames
from lara_adapter.data.gap import Gap
from lara_adapter.data.scan import scan_source
from lara_adapter.data.video import Converter
from lara_adapter.lam.pixels import resize

FORMATS = {
    "a.mp4": ("libx264", {"bf": 3, "g": 12}),
    "two.mp4": ("libx264", {"bf": 3, "g": 2}),
    "open.mp4": ("libx264", {"bf": 3, "g": 20, "x264-params": "open-gop=1"}),
    "a.webm": ("libvpx-vp9", {"g": 15, "deadline": "realtime"}),
    "a.avi": ("mpeg4", {"bf": 2}),
    "a.mkv": ("libx264", {"g": 250}),
    "a.mov": ("mjpeg", {}),
    "unordered.avi": ("libx264", {}),  # avi has no presentation times: H.264 with B-frames comes without any
}


@pytest.mark.parametrize("name", FORMATS)
def test_frames_from_the_middle_are_those_of_a_whole_pass(tmp_path, name):
    codec, options = FORMATS[name]
    source = Source(write_video(tmp_path / name, numbered(61), codec, **options))
    whole = [Converter(64)(decoded.frame) for decoded in decode_all(source)]
    assert [number_of(frame) for frame in whole] == [(0, n) for n in range(61)]
    scan = scan_source(source, Gap(5))
    keys = np.flatnonzero(scan.key)
    for first in range(0, 54, 6):
        wanted = np.array([first, first + 1, first + 7])
        read = read_frames(source, scan.pts, keys, wanted, 64)
        assert all((frame == whole[number]).all() for frame, number in zip(read, wanted))


def test_frames_are_rgb_and_scaled_like_the_models_own_scaling(tmp_path):
    frames = list(square(3, side=128))
    source = Source(write_video(tmp_path / "a.mkv", frames, "ffv1"))
    small = Converter(48)(next(iter(decode_all(source))).frame)
    wanted = resize(torch.from_numpy(frames[0]).permute(2, 0, 1)[None].float(), 48)[0].permute(1, 2, 0)
    difference = np.abs(small.astype(float) - wanted.numpy())
    assert difference.mean() < 1  # of 255
    yellow = small[tuple(np.argwhere(wanted.numpy()[..., 0] > 230)[4])]
    assert yellow[0] > 200 > yellow[2]


def test_pictures_are_read_by_number_and_a_damaged_one_is_skipped(tmp_path):
    for number, frame in enumerate(numbered(12)):
        (tmp_path / f"frame_{number}.png").write_bytes(png(frame))
    (tmp_path / "frame_6.png").write_bytes(b"no picture")
    source = Source(tmp_path, "pictures", fps=10)
    scan = scan_source(source, Gap(2))
    assert len(scan.pts) == 11
    assert scan.broken.tolist() == [False] * 6 + [True] + [False] * 4
    read = read_frames(source, scan.pts, np.flatnonzero(scan.key), np.array([5, 6, 10]), 32)
    assert [number_of(frame)[1] for frame in read] == [5, 7, 11]  # natural order: 10 is not after 1


@pytest.mark.parametrize("content", [b"", b"\x00" * 5000, b"RIFF but nothing else"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.mp4"):
        scan_source(Source(tmp_path / "a.mp4"), Gap(5))


def test_sound_alone_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no video"):
        scan_source(Source(write_audio(tmp_path / "a.mp4")), Gap(5))


def test_a_video_that_changed_after_it_was_indexed_is_reported(tmp_path):
    source = Source(write_video(tmp_path / "a.mp4", numbered(40)))
    scan = scan_source(source, Gap(5))
    write_video(tmp_path / "a.mp4", numbered(20))
    with pytest.raises(DatasetError, match=r"a\.mp4: 1 of the frames 10 to 30 .* was the file changed"):
        read_frames(source, scan.pts, np.flatnonzero(scan.key), np.array([10, 30]), 32)


def test_a_damaged_stretch_breaks_pairs_and_not_the_file(tmp_path):
    path = write_video(tmp_path / "a.avi", square(120), g=10)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(bytes(content))
    scan = scan_source(Source(path), Gap(5))
    assert 60 < len(scan.pts) <= 120
    assert scan.broken.any() or len(scan.pts) < 120


def test_closing_a_decoder_midway_waits_for_no_thread(tmp_path):
    found = abandon_decoders(tmp_path)
    assert found.stdout == "done\n", found.stderr
