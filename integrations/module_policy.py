"""A torch module that acts, behind a socket: arrays become tensors, and a seed decides the noise of one call."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lara_adapter.errors import LaraArgumentError

__all__ = ["ModulePolicy", "seeded"]


@contextlib.contextmanager
def seeded(options: Mapping[str, Any] | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within this context torch draws from `options["seed"]`, if there is one; afterwards its state is as before.

    Raises:
        LaraArgumentError: the seed is not an integer of 0 ... 2^63 - 1.
    """
    seed = (options or {}).get("seed")
    if seed is None:
        yield
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise LaraArgumentError(f"options: seed={seed!r:.40}, but an integer of 0 ... 2^63 - 1 is expected")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class ModulePolicy:
    """Serves an nn.Module that has `get_action(observation)`; `options` other than the seed reach one that takes them."""

    def __init__(self, module: nn.Module) -> None:
        act: Any = getattr(module, "get_action", None)
        if not callable(act):
            raise LaraArgumentError(f"policy: {type(module).__name__} has no get_action(observation)")
        self.module: Any = module.eval()
        first = next(module.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._takes_options = "options" in inspect.signature(act).parameters
        for name in ("reset", "get_modality_config"):
            if callable(getattr(module, name, None)):
                setattr(self, name, getattr(module, name))

    @torch.inference_mode()
    def get_action(self, observation: Any, options: dict[str, Any] | None = None) -> Any:
        """Act on an observation of arrays; see :func:`seeded` for `options`."""
        more = {"options": options} if self._takes_options else {}
        with seeded(options, self.device):
            return self.module.get_action(_to_tensors(observation, self.device), **more)


def _to_tensors(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value).to(device)
    if isinstance(value, Mapping):
        return {key: _to_tensors(entry, device) for key, entry in value.items()}
    return value
