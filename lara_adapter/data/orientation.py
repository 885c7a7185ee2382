"""How a stored frame has to be turned to be shown: a video's display matrix, or the EXIF data of a picture."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any, NamedTuple

import numpy as np

from ..errors import DatasetError

__all__ = ["UPRIGHT", "Orientation", "orientation_of_frame", "orientation_of_picture"]


class Orientation(NamedTuple):
    """Rows and columns are first exchanged, then reversed."""

    exchange: bool = False  # rows and columns
    rows: bool = False  # the last row becomes the first
    columns: bool = False  # the last column becomes the first

    def turn(self, image: np.ndarray) -> np.ndarray:
        """An image [H, W, C] upright; the same array if it is."""
        if self == UPRIGHT:
            return image
        image = image.swapaxes(0, 1) if self.exchange else image
        return np.ascontiguousarray(image[:: -1 if self.rows else 1, :: -1 if self.columns else 1])

    def __str__(self) -> str:
        return _NAMES[self]


UPRIGHT = Orientation()
# by the number that EXIF has for them
_EXIF = {
    1: UPRIGHT,
    2: Orientation(False, False, True),
    3: Orientation(False, True, True),
    4: Orientation(False, True, False),
    5: Orientation(True, False, False),
    6: Orientation(True, False, True),
    7: Orientation(True, True, True),
    8: Orientation(True, True, False),
}
_TEXTS = ("upright", "mirrored", "turned by 180 degrees", "upside down", "mirrored and turned by 270 degrees",
          "turned by 90 degrees", "mirrored and turned by 90 degrees", "turned by 270 degrees")  # fmt: skip
_NAMES = dict(zip(_EXIF.values(), _TEXTS))  # clockwise


def orientation_of_frame(frame: Any) -> Orientation:
    """Of av's frame of a video, by its display matrix; of any angle the nearest right one."""
    try:
        sides = [side for side in frame.side_data if side.type.name == "DISPLAYMATRIX"]
    except ValueError:  # PyAV 18.1 cannot list what FFmpeg 8 calls EXIF, and then knows the angle alone
        turns = round(-frame.rotation / 90) % 4
        return (UPRIGHT, _EXIF[6], _EXIF[3], _EXIF[8])[turns]
    if not sides:
        return UPRIGHT
    # x' = a x + c y and y' = b x + d y, in FFmpeg's order a b u c d v x y w
    a, b, _, c, d = struct.unpack("=9i", bytes(sides[0]))[:5]
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, b < 0, c < 0)
    return Orientation(False, d < 0, a < 0)


def orientation_of_picture(content: bytes) -> Orientation:
    """Of the content of a picture file, by its EXIF data.

    Raises:
        DatasetError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DatasetError(f"reading pictures needs Pillow: pip install 'lara-adapter[video]' ({error})") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, and of damaged EXIF data
        try:
            with Image.open(io.BytesIO(content)) as image:
                return _EXIF.get(image.getexif().get(0x0112, 1), UPRIGHT)
        # what Pillow cannot read has no EXIF data for us; SyntaxError, struct.error: damaged ones
        except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
            return UPRIGHT
