"""Checks of untrusted input: JSON, the header of a safetensors file, file names.

What passes is bounded in size, depth and numbers, has no name twice, and stays inside its folder.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import AdapterFormatError

__all__ = ["MAX_HEADER_BYTES", "check_tensor_file", "not_tensors", "parse_json", "safe_path", "short"]

MAX_HEADER_BYTES = 16 * 2**20  # a hundred thousand tensors; safetensors itself would read 100 MB
_MAX_DEPTH = 32
_MAX_DIGITS = 20  # 64 bits
# how the Hub's client lays out its cache: a file of a snapshot is a link to a blob of the same repository
_SNAPSHOT = re.compile(r"(.*[/\\](?:models|datasets|spaces)--[^/\\]+)[/\\]snapshots[/\\][^/\\]+(?:[/\\]|$)")


def short(value: Any) -> str:
    """`repr` for a message, of bounded length."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def parse_json(data: bytes, source: str | Path) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8 read from `source`.

    Raises:
        AdapterFormatError: not JSON, not an object, a name given twice, NaN or infinity, an integer of more than 64 bits,
            nested deeper than 32, or text that is not Unicode.
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
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _bounded(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _walk(content: Any) -> None:
    """Refuse depth, lone surrogates and NUL: nothing of ours writes them, and later code fails on them."""
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


def check_tensor_file(path: Path) -> dict[str, tuple[int, ...]]:
    """Check a safetensors file by its header; no tensor is read.

    safetensors itself refuses offsets that overlap, leave a hole or do not fit dtype, shape or file (0.4.0 and 0.8.0
    probed). It accepts a name given twice and headers of 100 MB; those are refused here.

    Returns:
        Name to shape.

    Raises:
        AdapterFormatError: the file is not readable, or its header is damaged or untrue.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length > MAX_HEADER_BYTES and length + 8 <= size:
                raise AdapterFormatError(f"{path}: its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
            if length < 2 or length + 8 > size:
                raise not_tensors(path, _guess_format(start))
            header = parse_json(stream.read(length), f"{path}: the header")
        with safe_open(path, framework="pt"):
            pass
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read ({error})") from error
    except SafetensorError as error:
        raise not_tensors(path, error) from error
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def not_tensors(path: Path, reason: object) -> AdapterFormatError:
    """The error for a file that is not safetensors, or no longer."""
    return AdapterFormatError(f"{path} is truncated or not a safetensors file ({reason}); download or save it again")


def _guess_format(start: bytes) -> str:
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it looks like a pickle of torch.save, which is never opened: it can run code"
    if start.startswith(b"version "):
        return "it looks like a Git LFS pointer"
    return "its header does not fit in the file"


def safe_path(folder: Path, name: str) -> Path:
    """`folder / name`, with forward slashes, checked to stay inside the folder; the file need not exist.

    Raises:
        AdapterFormatError: the name, or a link on the way, leads out of the folder. Links of the Hub client's cache, from a
            snapshot to a blob of the same repository, are allowed.
    """
    if len(name) > 200 or set(name) & set("\\:\x00") or {"", ".", ".."} & set(name.split("/")):
        raise AdapterFormatError(f"{folder}: {short(name)} is not the name of a file inside this folder")
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link in a circle
        raise AdapterFormatError(f"{path}: a broken link ({error})") from error
    snapshot = _SNAPSHOT.match(f"{root}/")
    if not real.is_relative_to(root) and not (snapshot and real.is_relative_to(Path(snapshot[1]) / "blobs")):
        raise AdapterFormatError(f"{path} is a link out of its folder; it is not followed")
    return path
