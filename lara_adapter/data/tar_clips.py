"""The clips of a WebDataset shard: what the names of its members say, and where the members of a clip are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import DatasetError
from .sources import PICTURES, VIDEOS, shown
from .tar import Member, members

__all__ = ["COMPRESSED", "Place", "Shard", "Stretch", "parse_name", "scan_shard"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstd
_NUMBER = re.compile("[0-9]+")
_NUMBERED = re.compile("(.*?)[_-]?([0-9]+)", re.DOTALL)
_SUFFIXES = VIDEOS | PICTURES


class Place(NamedTuple):
    """What a member's name says."""

    clip: str
    camera: str
    order: tuple[int, ...]  # of a picture in its clip; (): a video


class Stretch:
    """Where a camera of a clip is in its shard; members of others may lie between.

    Attributes:
        start: first byte.
        stop: the byte after the last.
        count: members.
        is_video: whether they are a video; else pictures.
    """

    def __init__(self, member: Member, is_video: bool) -> None:
        self.start, self.stop, self.count, self.is_video = member.header, member.stop, 0, is_video


class Shard(NamedTuple):
    """What an archive holds."""

    clips: dict[str, dict[str, Stretch]]  # clip -> camera -> where it is
    singles: list[str]  # pictures that belong to no clip
    cut: str  # the clip whose video is truncated; "": none
    damage: str  # why nothing more was found; "": the archive is whole


def scan_shard(path: Path) -> Shard:
    """Find the clips of an archive by its headers.

    Raises:
        DatasetError: it is compressed.
    """
    found: dict[str, dict[str, Stretch]] = {}
    cut = damage = ""
    try:
        with path.open("rb") as file:
            if path.name.lower().endswith(COMPRESSED) or file.read(6).startswith(_STARTS):
                raise DatasetError(
                    f"{shown(path)} is compressed: unpack it to a .tar file, in which a clip can be read without the others"
                )
            size = os.fstat(file.fileno()).st_size
            for member in members(file):
                place = parse_name(member.name)
                if place is None:
                    continue
                if member.start + member.size > size:
                    if place.order:
                        continue
                    cut = place.clip
                cameras = found.setdefault(place.clip, {})
                stretch = cameras.get(place.camera)
                if stretch is None:
                    stretch = cameras[place.camera] = Stretch(member, not place.order)
                stretch.stop, stretch.count = member.stop, stretch.count + 1
    except (OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        damage = str(error)
    clips, singles = {}, []
    for clip, cameras in found.items():
        whole = {camera: each for camera, each in cameras.items() if each.is_video or each.count > 1}
        singles += [clip] * (len(cameras) - len(whole))
        if whole:
            clips[clip] = whole
    return Shard(clips, singles, cut, damage)


def parse_name(name: str) -> Place | None:
    """What a member's name says; None: it is neither a video nor a picture."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    *parts, suffix = field.split(".")
    suffix = f".{suffix.lower()}"
    if not key or key.startswith("__") or suffix not in _SUFFIXES:
        return None
    if suffix in VIDEOS:
        return Place(folder + slash + key, ".".join(parts) or "video", ())
    camera = ".".join(part for part in parts if not _NUMBER.fullmatch(part)) or "image"
    order = tuple(int(part) for part in parts if _NUMBER.fullmatch(part))
    if order:
        return Place(folder + slash + key, camera, order)
    numbered = _NUMBERED.fullmatch(key)
    clip = (folder + slash + numbered[1]).rstrip("/") if numbered else ""
    if numbered and clip:
        return Place(clip, camera, (int(numbered[2]),))
    return Place(folder + slash + key, camera, (0,))
