"""Files and folders, written whole or not at all; JSON and tensors, read strictly and never as code."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import AdapterFormatError, LaraArgumentError
from .sharding import whole
from .untrusted import check_tensor_file, not_tensors, parse_json

__all__ = ["ADAPTER_FILE", "check_folder", "check_tensors", "check_values", "exchange", "kind_of", "load_into",
           "missing", "read_json", "read_tensors", "replace_file", "replace_folder", "sha256",
           "write_json", "write_tensors"]  # fmt: skip

ADAPTER_FILE = "lara_config.json"  # how an adapter is recognised, in a folder or repository
MAX_JSON_BYTES = 16 * 2**20


def _sync(path: Path) -> None:
    """Force a file or folder to disk, so that a rename never precedes its content after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (not Linux, or a network disk)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(cwd, os.fsencode(one), cwd, os.fsencode(other), swap) == 0)


@contextlib.contextmanager
def replace_folder(
    target: str | os.PathLike[str], *, keep_others: bool = True, ours: Collection[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder that replaces `target` at the end of the block; if the block raises, `target` is unchanged.

    Args:
        target: folder to create or replace.
        keep_others: keep files of an existing `target` that the block did not write.
        ours: names in `target` that are ours, and not kept if the block did not write them.

    Raises:
        AdapterFormatError: `target` exists and is not a folder.
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise AdapterFormatError(f"{target} is a file, but a folder is expected; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        fresh.chmod(0o755)  # mkdtemp makes 0o700, which would lock other users out of a shared checkpoint
        yield fresh
        for path in sorted(fresh.rglob("*")):
            _sync(path)
        _sync(fresh)
        if not target.exists():
            os.replace(fresh, target)
        else:
            for entry in target.iterdir() if keep_others else ():
                if entry.name not in ours and not (fresh / entry.name).exists():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.copytree(entry, fresh / entry.name, symlinks=True)
                    else:
                        shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)
            if exchange(fresh, target):  # the folder exists at every moment
                shutil.rmtree(fresh, ignore_errors=True)
            else:
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
                os.replace(target, old)
                os.replace(fresh, target)
                shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextlib.contextmanager
def replace_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a new file that replaces `target` at the end of the block; if it raises, `target` is unchanged."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.new-", suffix=target.suffix, dir=target.parent)
    os.close(descriptor)
    fresh = Path(name)
    try:
        yield fresh
        fresh.chmod(0o644)
        _sync(fresh)
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(2**20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a mapping as indented, key-ordered JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replace_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AdapterFormatError: the file is missing, too large, not JSON, or not an object; see :func:`.untrusted.parse_json`.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise AdapterFormatError(f"{path} is not a file")  # reading a pipe would block
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterFormatError(f"{path} is larger than {MAX_JSON_BYTES} bytes: not a configuration")
        data = path.read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise AdapterFormatError(f"{path} cannot be read ({error})") from error
    return parse_json(data, path)


def missing(path: Path) -> AdapterFormatError:
    """The error for a missing file; it lists what is in the folder."""
    return AdapterFormatError(f"{path} is missing: {neighbours(path.parent)}")


def neighbours(folder: Path) -> str:
    """Describe a folder that does not have the expected file, an interrupted save first."""
    backups = [path for path in folder.parent.glob(f".{folder.name}.old-*") if any(path.iterdir())]
    if backups:
        newest = max(backups, key=lambda path: path.stat().st_mtime)
        return f"an interrupted save left the previous content in {newest}; rename it to {folder}"
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    holds = f"the folder holds {sorted(p.name for p in folder.iterdir())[:20]}"
    return f"{holds}, as {kind} does" if (kind := kind_of(folder)) else holds


def kind_of(folder: Path) -> str | None:
    """What a folder is that was named in place of another; None: nothing that is known here."""
    if (folder / ADAPTER_FILE).is_file():
        return "a LARA adapter (its latent action model is in lam/)"
    if (folder / "meta/info.json").is_file():
        return "a LeRobot dataset"
    config = folder / "config.json"
    if config.is_file() and config.stat().st_size < MAX_JSON_BYTES:
        return "a latent action model" if b"lara_adapter.latent_action_model" in config.read_bytes() else None
    return None


def check_folder(name: str, path: Path) -> None:
    """Refuse an argument that is to be a folder, and is a file or would lie in one.

    Raises:
        LaraArgumentError: it is.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise LaraArgumentError(f"{name}={str(path)!r}: {there} is a file, but a folder is expected")


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Write tensors of any dtype and device as safetensors, atomically, with `metadata` in the header.

    Tensors that share storage are cloned. DTensors are gathered, and then every rank must call this.
    """
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = whole(tensor)
        # safetensors refuses tensors that share storage (safetensors#98)
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    with replace_file(path) as fresh:
        save_file(plain, fresh, metadata={"format": "pt", **metadata})


def read_tensors(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Read tensors of a safetensors file onto the CPU: `names`, or all.

    Raises:
        AdapterFormatError: the file is missing, truncated, or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise missing(path)
    shapes = check_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (shapes if names is None else names)}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise not_tensors(path, f"{type(error).__name__}: {error}") from error


def load_into(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str | os.PathLike[str]) -> None:
    """Load tensors into a module, which is unchanged if :func:`check_tensors` raises."""
    check_tensors(source, tensors, module.state_dict(), type(module).__name__)
    module.load_state_dict(dict(tensors), strict=True)


def check_tensors(
    source: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], owner: str,
    fix: str = "",
) -> None:  # fmt: skip
    """Check tensors read from `source` before they are loaded into those of `owner`; `fix` ends the message about names.

    Raises:
        AdapterFormatError: names are missing or unexpected, a shape or kind of dtype differs, a value is not finite.
    """
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise AdapterFormatError(
            f"{source} does not fit {owner}: {len(missing)} tensors missing {missing[:5]}, {len(unexpected)} unexpected "
            f"{unexpected[:5]}{fix}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise AdapterFormatError(
                f"{source}: {name} has shape {list(tensor.shape)}, but {owner} expects {list(own[name].shape)}"
            )
        check_values(source, name, own[name], tensor)


def check_values(
    source: str | os.PathLike[str], name: str, target: torch.Tensor, tensor: torch.Tensor, infinite: bool = False
) -> None:
    """Check a tensor read from `source` before it is loaded into `target`; `infinite`: infinite values are allowed.

    Raises:
        AdapterFormatError: one is floating point and the other is not, or a value is not finite.
    """
    if tensor.dtype.is_floating_point != target.dtype.is_floating_point:
        raise AdapterFormatError(f"{source}: {name} is {tensor.dtype}, but {target.dtype} is expected")
    if not tensor.dtype.is_floating_point:
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
    if not (~values.isnan() if infinite else values.isfinite()).all():
        raise AdapterFormatError(f"{source}: {name} holds NaN or infinite values; the file is damaged or diverged")
