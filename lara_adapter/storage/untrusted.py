"""Bytes of strangers: JSON, the header of a safetensors file, names of files. Checked before anything acts on them.

What passes here is bounded in size, depth and numbers, holds no name twice, and leads nowhere outside its folder.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError

__all__ = ["MAX_HEADER_BYTES", "check_tensor_file", "inside", "parse_json", "short"]

MAX_HEADER_BYTES = 16 * 2**20  # a hundred thousand tensors; safetensors itself would read 100 MB
_MAX_DEPTH = 32
_MAX_DIGITS = 20  # 64 bits
_DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
           "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip
# how the Hub's client lays out its cache: a file of a snapshot is a link to a blob of the same repository
_SNAPSHOT = re.compile(r"(.*[/\\](?:models|datasets|spaces)--[^/\\]+)[/\\]snapshots[/\\][^/\\]+(?:[/\\]|$)")


def short(value: Any) -> str:
    """`repr` for a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


# ---------------------------------------------------------------------- JSON


def parse_json(data: bytes, source: str | Path) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        data: UTF-8.
        source: where it comes from, for the message.

    Raises:
        AdapterFormatError: no JSON, not an object, a name given twice, NaN or infinity, an integer of more than 64 bits,
            nested deeper than 32, or text that is no Unicode.
    """
    try:
        content = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite,
            parse_int=_bounded,
        )  # fmt: skip
        _walk(content)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{source} is not readable JSON ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{source} holds a JSON {type(content).__name__}, but an object is expected")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"the name {short(twice)} is given twice")
    return content


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _walk(content: Any) -> None:
    """Refuse what no writer of ours makes and what trips later code: depth, lone surrogates, NUL."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode("utf-8")  # UnicodeEncodeError is a ValueError
                if "\x00" in value:
                    raise ValueError("a NUL character in a text")
        if not below:
            return
        level = below
    raise ValueError(f"nested deeper than {_MAX_DEPTH}")


# ---------------------------------------------------------------------- safetensors


def check_tensor_file(path: Path) -> dict[str, tuple[int, ...]]:
    """Read and check the header of a safetensors file; of the tensors nothing is read.

    Every tensor's dtype, shape and place must agree, the places must not overlap, leave no hole and end where the file
    ends; no name may stand there twice.

    Returns:
        Name to shape.

    Raises:
        AdapterFormatError: any of this is not so.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length > MAX_HEADER_BYTES and length + 8 <= size:
                raise AdapterFormatError(
                    f"{path}: its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read"
                )
            if length < 2 or length + 8 > size:
                raise AdapterFormatError(
                    f"{path} is truncated or no safetensors file ({_looks(start)}); download or save it again"
                )
            header = parse_json(stream.read(length), f"{path}: the header")
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError(f"{path}: __metadata__ is {short(metadata)}, but text to text is expected")
    places, shapes = [], {}
    for name, entry in header.items():
        begin, end, shapes[name] = _entry(path, name, entry)
        places.append((begin, end, name))
    at, total = 0, size - 8 - length
    for begin, end, name in sorted(places):
        if end > total:
            raise AdapterFormatError(
                f"{path} is truncated or no safetensors file (tensor {short(name)} ends at byte {end} of {total}); "
                "download or save it again"
            )
        if begin != at:
            raise AdapterFormatError(
                f"{path}: tensor {short(name)} is said to begin at byte {begin}, but the one before it ends at {at}: the "
                "header lies"
            )
        at = end
    if at != total:
        raise AdapterFormatError(f"{path}: {total - at} bytes at the end belong to no tensor: the header lies")
    return shapes


def _looks(start: bytes) -> str:
    """What the first bytes tell."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it looks like a pickle of torch.save, which is never opened: it can run code"
    if start.startswith(b"version "):
        return "it looks like a Git LFS pointer"
    return "its length and that of its header do not agree"


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, tuple[int, ...]]:
    def wrong(why: str) -> AdapterFormatError:
        return AdapterFormatError(f"{path}: tensor {short(name)}: {why}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong(f"{short(entry)}, but dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise wrong(f"unknown dtype {short(dtype)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise wrong(f"{what} {short(numbers)}")
    if len(shape) > 16 or len(offsets) != 2:
        raise wrong(f"shape {short(shape)}, data_offsets {short(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype]:
        raise wrong(f"{dtype} {shape} does not take the bytes {offsets[0]} to {offsets[1]}")
    return offsets[0], offsets[1], tuple(shape)


# ---------------------------------------------------------------------- names


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, links followed.

    Args:
        folder: what was downloaded or saved.
        name: relative, with forward slashes.

    Returns:
        `folder / name`; it need not exist.

    Raises:
        AdapterFormatError: the name, or a link on the way, leads out of the folder. Links of the Hub client's cache, from a
            snapshot to a blob of the same repository, are as they should be.
    """
    parts = name.split("/")
    if (
        len(name) > 200
        or "\\" in name
        or ":" in name
        or "\x00" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise AdapterFormatError(f"{folder}: {short(name)} is no name of a file inside this folder")
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link in a circle
        raise AdapterFormatError(f"{path}: a link that leads nowhere ({error})") from error
    snapshot = _SNAPSHOT.match(f"{root}/")
    if not real.is_relative_to(root) and not (snapshot and real.is_relative_to(Path(snapshot[1]) / "blobs")):
        raise AdapterFormatError(f"{path} is a link to a place outside the folder; it is not followed")
    return path
