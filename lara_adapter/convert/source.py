"""Find and read the files of a checkpoint of the authors, without running anything in them.

Settings are JSON or YAML (safe loader); weights are safetensors, whole or in shards, and pickles only if the caller allows
them, by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFormatError, LaraArgumentError
from ..storage.files import MAX_JSON_BYTES, read_json, read_tensors
from ..storage.hub import locate_folder
from ..storage.untrusted import check_tensor_file

__all__ = ["SETTINGS", "Weights", "find", "find_weights", "read_settings"]

SETTINGS = ("config.yaml", "config.json")  # in the order of the official loader
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# YAML 1.1 reads 1e-12 as a string; the official settings are written for a loader that reads a number.
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


def find(
    source: str | os.PathLike[str], subfolder: str | None, revision: str | None, allow_pickle: bool
) -> tuple[Path, Path]:
    """The folder or file of `source`, and the local or downloaded folder that holds it.

    Raises:
        AdapterFormatError: it does not exist.
        LaraArgumentError: `subfolder` leads out of the source, or the source is a file.
    """
    if subfolder is not None and (not subfolder or Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise LaraArgumentError(f"convert: subfolder={subfolder!r}, but a folder inside the source is expected")
    path = Path(source)
    if path.is_file():
        if subfolder is not None:
            raise LaraArgumentError(f"convert: subfolder={subfolder!r}, but the source {path} is a file")
        return path, path.parent
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}config.*", f"{prefix}conversion.json", f"{prefix}*.safetensors", f"{prefix}{_SAFE[1]}"]
    if allow_pickle:
        patterns += [f"{prefix}*.bin", f"{prefix}{_PICKLED[1]}"]
    # a policy's own settings, and those of the tokenizer inside a policy's folder
    root = locate_folder(
        source, revision, [*patterns, "config.json", "latent_motion_tokenizer/config.*"], "checkpoint with a config"
    )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise AdapterFormatError(
            f"{root} has no folder {subfolder!r}; it holds {sorted(p.name for p in root.iterdir())}"
        )
    return folder, root


def find_weights(folder: Path) -> Path:
    """The weights file, or the index of the shards, of a folder; safetensors before pickles.

    Raises:
        AdapterFormatError: there is none.
    """
    for name in (*_SAFE, *_PICKLED):
        if (folder / name).is_file():
            return folder / name
    names = sorted(p.name for p in folder.iterdir())[:20]
    raise AdapterFormatError(f"{folder} holds none of {', '.join((*_SAFE, *_PICKLED))}; it holds {names}")


def read_settings(path: Path) -> dict[str, Any]:
    """Read `config.yaml` or `config.json` as plain values.

    Raises:
        AdapterFormatError: missing, too large, damaged, not a mapping, or YAML without PyYAML.
    """
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    try:
        import yaml
    except ImportError as error:
        raise AdapterFormatError(f"{path} needs PyYAML, which cannot be imported: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):
        """Safe, with numbers such as 1e-12."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise AdapterFormatError(f"{path} is larger than {MAX_JSON_BYTES} bytes: not settings of a model")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AdapterFormatError(f"{path} is not readable YAML ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{path} holds a YAML {type(content).__name__}, but a mapping is expected")
    return content


class Weights:
    """The tensors of a checkpoint by name, in one file or in shards; read on request.

    Args:
        path: a safetensors file, the index of shards, or a pickle.
        allow_pickle: whether a pickle may be opened.

    Raises:
        AdapterFormatError: a file is missing, truncated, a pickle that may not be opened, or does not match the index.
    """

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self.path = path
        self._allow_pickle = allow_pickle
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._where: dict[str, Path] = {}
        if not path.name.endswith(".index.json"):
            self._where = dict.fromkeys(self._names(path), path)
            return
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise AdapterFormatError(f"{path} is not an index of shards: it has no weight_map")
        for name, shard in weight_map.items():
            # a name from the file must not lead out of its folder
            if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard.startswith("."):
                raise AdapterFormatError(
                    f"{path} places {name} in {shard!r}, but the name of a file beside it is expected"
                )
            self._where[name] = path.parent / shard
        for shard in sorted(set(self._where.values())):
            listed, held = {name for name, file in self._where.items() if file == shard}, set(self._names(shard))
            if listed != held:
                raise AdapterFormatError(
                    f"{shard} does not match {path.name}: {len(listed - held)} tensors missing "
                    f"{sorted(listed - held)[:5]}, {len(held - listed)} unknown {sorted(held - listed)[:5]}"
                )

    @property
    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(self._where)

    def files(self, names: Iterable[str]) -> list[Path]:
        """The files that hold these tensors."""
        return sorted({self._where[name] for name in names})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, in the dtype of the file.

        Raises:
            AdapterFormatError: damaged, not floating point, or NaN or infinite values; the message names file and tensor.
        """
        result = self._fetch(names)
        for name, tensor in result.items():
            if not tensor.is_floating_point():
                raise AdapterFormatError(f"{self._where[name]}: {name} is {tensor.dtype}, but a float type is expected")
            if not torch.isfinite(tensor).all():
                raise AdapterFormatError(
                    f"{self._where[name]}: {name} holds NaN or infinite values; the file is damaged or training diverged"
                )
        return result

    def read_counters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Integer scalars by name; raises as :meth:`read`."""
        result = self._fetch(names)
        for name, tensor in result.items():
            if tensor.is_floating_point() or tensor.ndim:
                raise AdapterFormatError(
                    f"{self._where[name]}: {name} is {tensor.dtype} {list(tensor.shape)}, but one integer is expected"
                )
        return result

    def _fetch(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = sorted(names)
        result: dict[str, Tensor] = {}
        for path in self.files(names):
            own = [name for name in names if self._where[name] == path]
            if path in self._pickled:
                result |= {name: self._pickled[path][name] for name in own}
            else:
                result |= read_tensors(path, own)
        return result

    def _names(self, path: Path) -> list[str]:
        if not path.is_file():
            raise AdapterFormatError(f"{path} is missing")
        if path.suffix != ".safetensors":
            self._pickled[path] = _unpickle(path, self._allow_pickle)
            return list(self._pickled[path])
        return list(check_tensor_file(path))


def _unpickle(path: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise AdapterFormatError(
            f"{path} is a pickle, which can run code when it is opened; if you trust its source, pass --allow-pickle "
            "(allow_pickle=True): it is then read by torch.load(weights_only=True)"
        )
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 6):
        # CVE-2025-32434: before 2.6 even weights_only may run code
        raise AdapterFormatError(
            f"{path} is a pickle, and torch {torch.__version__} cannot read one safely; use torch >= 2.6"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise AdapterFormatError(
            f"{path} is truncated or holds more than tensors ({type(error).__name__}: {error}); it was not loaded"
        ) from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{path} holds a {type(content).__name__}, but tensors by name are expected")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise AdapterFormatError(f"{path}: {name!r} is a {type(tensor).__name__}, but tensors by name are expected")
    return dict(content)
