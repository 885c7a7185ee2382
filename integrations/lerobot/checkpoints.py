"""Checkpoints that are stock LeRobot's, with LARA beside them.

    checkpoints/000100/pretrained_model/model.safetensors   without LARA: loads in LeRobot as it is, strictly
    checkpoints/000100/pretrained_model/lara/               the adapter and the data settings
    checkpoints/000100/training_state/                      the optimizer, LARA's moments among the policy's

With `lara.*` inside model.safetensors GR00T and X-VLA would refuse the file (they load strictly), and pi0 and pi0.5 would
rename those keys or drop them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn

from lara_adapter import LaraAdapter
from lara_adapter.errors import AdapterFormatError
from lara_adapter.storage.files import read_json, write_json

__all__ = ["FOLDER", "DataSettings", "find_adapter", "save_beside", "stock_saves"]

FOLDER = "lara"  # inside pretrained_model/
_DATA_FILE = "lerobot.json"
_SCHEMA = 1


@dataclass(frozen=True)
class DataSettings:
    """What LaraDataset was given, for the runs that go on from a checkpoint.

    Attributes:
        cameras: keys of the cameras.
        horizon: C, in frames.
        size: (height, width) in pixels, or None.
    """

    cameras: Sequence[str]
    horizon: int
    size: Sequence[int] | None = None

    @classmethod
    def read(cls, folder: Path) -> DataSettings:
        """Read what :func:`save_beside` wrote.

        Raises:
            AdapterFormatError: missing, newer, or with values of another kind.
        """
        path = folder / _DATA_FILE
        content = read_json(path)
        version = content.pop("schema_version", None)
        if version != _SCHEMA:
            raise AdapterFormatError(f"{path} has schema_version={version!r}, but this lara_adapter reads {_SCHEMA}")
        cameras, horizon, size = (content.get(name) for name in ("cameras", "horizon", "size"))
        if not (
            isinstance(cameras, list) and cameras and all(isinstance(name, str) for name in cameras)
            and isinstance(horizon, int)
            and (size is None or (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)))
        ):  # fmt: skip
            raise AdapterFormatError(f"{path} holds {content}, but cameras, horizon and size are expected")
        return cls(tuple(cameras), horizon, None if size is None else tuple(size))


def find_adapter(pretrained_model: Path) -> Path | None:
    """The adapter's folder in a checkpoint's `pretrained_model` folder, or None if it was saved without LARA."""
    folder = pretrained_model / FOLDER
    return folder if (folder / "lara_config.json").is_file() else None


def save_beside(lara: LaraAdapter, pretrained_model: Path, data: DataSettings) -> None:
    """Write the adapter and the data settings into a checkpoint's `pretrained_model/lara`; of several ranks the first."""
    lara.save_pretrained(pretrained_model / FOLDER)
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return
    write_json(pretrained_model / FOLDER / _DATA_FILE, {"schema_version": _SCHEMA, **asdict(data)})


def stock_saves(lara: LaraAdapter) -> None:
    """From now on `policy.save_pretrained(...)` writes the policy without LARA, as if nothing were attached.

    For policies of LeRobot, whose training loop saves with that method. The adapter has its own: `lara.save_pretrained`.

    Args:
        lara: attached.
    """
    policy = lara.policy
    prefix = ".".join(filter(None, (lara.spec.owner, "lara", "")))

    def _save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        # LeRobot hands over a state_dict that it gathered itself, where the policy is sharded
        if kwargs.get("state_dict") is not None:
            kept = {name: value for name, value in kwargs["state_dict"].items() if not name.startswith(prefix)}
            kwargs["state_dict"] = kept
        with _without(self):
            type(self)._save_pretrained(self, *args, **kwargs)  # type: ignore[operator]
        if not any(isinstance(module, LaraAdapter) for module in self.modules()):
            self.__dict__.pop("_save_pretrained", None)  # detached: nothing of ours stays

    object.__setattr__(policy, "_save_pretrained", types.MethodType(_save_pretrained, policy))


@contextlib.contextmanager
def _without(policy: nn.Module) -> Iterator[None]:
    """Take the adapter out of the module tree, so that it is in no state_dict, and put it back in its place."""
    owners = [
        (module, dict(module._modules))
        for module in policy.modules()
        if any(isinstance(child, LaraAdapter) for child in module._modules.values())
    ]
    try:
        for owner, children in owners:
            for name, child in children.items():
                if isinstance(child, LaraAdapter):
                    del owner._modules[name]
        yield
    finally:
        for owner, children in owners:
            owner._modules.clear()
            owner._modules.update(children)  # in their old order: the optimizer's state is stored by position
