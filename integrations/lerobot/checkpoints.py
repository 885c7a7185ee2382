"""Checkpoints that are stock LeRobot's, with LARA beside them.

    checkpoints/000100/pretrained_model/model.safetensors   without LARA: loads in LeRobot as it is, strictly
    checkpoints/000100/pretrained_model/lara/               the adapter and the data settings
    checkpoints/000100/training_state/                      the optimizer, LARA's moments among the policy's

With `lara.*` inside model.safetensors GR00T and X-VLA would refuse the file (they load strictly), and pi0 and pi0.5 would
rename those keys or drop them.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from lara_adapter import LaraAdapter
from lara_adapter.binding import ADAPTER_NAME
from lara_adapter.errors import AdapterFormatError
from lara_adapter.storage.files import read_json, write_json

from ..checkpoints import FOLDER, without_lara

__all__ = ["DataSettings", "save_beside", "stock_saves"]

_DATA_FILE = "lerobot.json"
_SCHEMA = 1
_KEYS = ("cameras", "horizon", "size")  # in the file: views, gap, frame_size


@dataclass(frozen=True)
class DataSettings:
    """The arguments of LaraDataset, for the runs that go on from a checkpoint.

    Attributes:
        views: keys of the cameras.
        gap: C, in frames.
        frame_size: (height, width) in pixels, or None.
    """

    views: Sequence[str]
    gap: int
    frame_size: Sequence[int] | None = None

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
        views, gap, size = (content.get(key) for key in _KEYS)
        if not (
            isinstance(views, list) and views and all(isinstance(name, str) for name in views)
            and isinstance(gap, int)
            and (size is None or (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)))
        ):  # fmt: skip
            raise AdapterFormatError(f"{path} holds {content}, but {', '.join(_KEYS)} are expected")
        return cls(tuple(views), gap, None if size is None else tuple(size))


def save_beside(lara: LaraAdapter, pretrained_model: Path, data: DataSettings) -> None:
    """Write the adapter and the data settings into a checkpoint's `pretrained_model/lara`; of several ranks the first."""
    lara.save_pretrained(pretrained_model / FOLDER)
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return
    values = dict(zip(_KEYS, (data.views, data.gap, data.frame_size)))
    write_json(pretrained_model / FOLDER / _DATA_FILE, {"schema_version": _SCHEMA, **values})


def stock_saves(lara: LaraAdapter) -> None:
    """From now on the `save_pretrained` of `lara.policy`, which LeRobot's training loop calls, writes it without LARA.

    The adapter has its own: `lara.save_pretrained`.
    """
    policy = lara.policy
    prefix = ".".join(filter(None, (lara.spec.owner, ADAPTER_NAME, "")))

    def _save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        # LeRobot hands over a state_dict that it gathered itself, where the policy is sharded
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = {k: v for k, v in kwargs["state_dict"].items() if not k.startswith(prefix)}
        with without_lara(self):
            type(self)._save_pretrained(self, *args, **kwargs)
        if not any(isinstance(module, LaraAdapter) for module in self.modules()):
            self.__dict__.pop("_save_pretrained", None)  # detached: remove this method too

    object.__setattr__(policy, "_save_pretrained", types.MethodType(_save_pretrained, policy))
