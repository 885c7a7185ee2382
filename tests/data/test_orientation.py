"""Videos and pictures that say how they are to be turned: every reader and decoder gives them as a player shows them."""

from __future__ import annotations

import io
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("av")

from helpers.videos import write_video
from PIL import Image

from lara_adapter.data import IndexSettings, build_index, find_sources, open_dataset
from lara_adapter.data.decode import read_frames
from lara_adapter.data.orientation import Orientation, orientation_of_picture
from lara_adapter.data.video import VideoFile, decode_picture

HEIGHT, WIDTH, ONE = 64, 96, 1 << 16

# a player's matrix (a, b, c, d): x' = a x + c y, y' = b x + d y; and the corner in which it puts what was top left
MATRICES = {
    "90": ((0, 1, -1, 0), "top right"),
    "180": ((-1, 0, 0, -1), "bottom right"),
    "270": ((0, -1, 1, 0), "bottom left"),
    "mirrored": ((-1, 0, 0, 1), "top right"),
    "upside down": ((1, 0, 0, -1), "bottom left"),
    "transposed": ((0, 1, 1, 0), "top left"),
    "transversed": ((0, -1, -1, 0), "bottom right"),
}


def picture(number: int = 0) -> np.ndarray:
    """A red corner at the top left, and a white bar that moves."""
    image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
    image[:16, :24] = (250, 0, 0)
    image[30:40, 20 + number : 40 + number] = 230
    return image


def corner(image: np.ndarray) -> str:
    """In which corner the red is."""
    height, width = image.shape[:2]
    red = image[..., 0].astype(int) - image[..., 1]
    share = {
        f"{row} {column}": red[rows, columns].mean()
        for (row, rows), (column, columns) in itertools.product(
            (("top", slice(height // 4)), ("bottom", slice(-height // 4, None))),
            (("left", slice(width // 4)), ("right", slice(-width // 4, None))),
        )
    }
    return max(share, key=share.__getitem__)


def phone_video(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A video whose header, as a phone writes it, says how it is to be turned."""
    write_video(path, map(picture, range(20)), "libx264")
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44  # version 0 of the box
    a, b, c, d = (ONE * each for each in matrix)
    assert content[place : place + 4] == struct.pack(">i", ONE)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_every_reader_turns_a_video(tmp_path, name):
    matrix, where = MATRICES[name]
    path = phone_video(tmp_path / "phone.mp4", matrix)
    shape = (WIDTH, HEIGHT, 3) if matrix[0] == 0 else (HEIGHT, WIDTH, 3)
    with VideoFile(path) as video:
        frame = next(video.all_frames())
    assert (frame.shape, corner(frame)) == (shape, where)
    with VideoFile(path) as video:
        assert corner(next(video.read(0.0, 1, 30.0))) == where
    dataset = open_dataset(path)
    picked = dataset.pick(dataset.camera(None), dataset.episodes[0], [5])[5]
    assert (picked.shape, corner(picked)) == (shape, where)
    (found,) = build_index(find_sources([path]), IndexSettings(held_out=0.0), tmp_path / "index").sources
    frames = read_frames(found.source, found.pts, found.keys, np.array([0, 7]), 48)
    assert [corner(each) for each in frames] == [where, where]
    # the same as turning before scaling, to the rounding of the scaler
    from torch import from_numpy

    from lara_adapter.lam.pixels import resize

    whole = resize(from_numpy(frame).permute(2, 0, 1), 48).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(whole - frames[0]).mean() < 6


@pytest.mark.parametrize("name", MATRICES)
def test_both_decoders_agree_on_size_and_orientation(tmp_path, name):
    pytest.importorskip("torchcodec")
    from lara_adapter.data.decode import require_decoder
    from lara_adapter.errors import DatasetError

    try:
        require_decoder("torchcodec")
    except DatasetError as error:
        pytest.skip(str(error))
    path = phone_video(tmp_path / "phone.mp4", MATRICES[name][0])
    (found,) = build_index(find_sources([path]), IndexSettings(held_out=0.0), tmp_path / "index").sources
    one, other = (
        read_frames(found.source, found.pts, found.keys, np.arange(8), 48, each) for each in ("av", "torchcodec")
    )
    assert one.shape == other.shape
    assert [corner(each) for each in one] == [corner(each) for each in other] == [MATRICES[name][1]] * 8
    assert np.abs(one.astype(int) - other).mean() < 3


# what a stored picture has to be, so that it is shown as `picture()`
STORED = {
    1: lambda i: i, 2: lambda i: i[:, ::-1], 3: lambda i: i[::-1, ::-1], 4: lambda i: i[::-1],
    5: lambda i: i.swapaxes(0, 1), 6: lambda i: np.rot90(i, 1), 7: lambda i: i[::-1, ::-1].swapaxes(0, 1),
    8: lambda i: np.rot90(i, -1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", STORED)
def test_pictures_are_turned_by_their_exif_data(number, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = number
    content = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(STORED[number](picture()))).save(content, kind, exif=exif, **options)
    image = decode_picture(content.getvalue(), "it")
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - picture()).mean() < 3
    # Pillow's own idea of it
    with Image.open(content) as opened:
        from PIL import ImageOps

        assert ImageOps.exif_transpose(opened).size == (WIDTH, HEIGHT)
    for place in range(3):
        (tmp_path / f"{place}.{kind.lower()}").write_bytes(content.getvalue())
    (source,) = find_sources([tmp_path])
    frames = read_frames(source, np.arange(3), np.arange(3), np.array([1]), 48)
    assert corner(frames[0]) == "top left"


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe1nothing", b"\x89PNG\r\n\x1a\n"])
def test_damaged_exif_data_do_not_stop_anything(content):
    assert orientation_of_picture(content) == Orientation()


def test_orientations_have_names():
    assert str(Orientation(True, False, True)) == "turned by 90 degrees"
    assert len({str(Orientation(*flags)) for flags in itertools.product((False, True), repeat=3)}) == 8
