"""Frozen networks that a module uses and does not own.

A frozen image encoder has a hundred times the weights of what is trained. Inside the module tree it would swell
every checkpoint, enter optimizers and FSDP units, and leave eval mode with each `policy.train()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OutsideTree"]


class OutsideTree(nn.Module):
    """Holds a frozen network so that state_dict, parameters, train, dtype casts and wrappers never see it.

    Only its device follows: when this module (or any parent) is moved, so is the network. It stays in eval mode and
    keeps the dtype that it was loaded in.

    Args:
        network: the network, or None to set it later by :meth:`hold`.
    """

    network: nn.Module | None

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        # nn.Module.__setattr__ would register it in _modules
        object.__setattr__(self, "network", None)
        self.home = torch.device("cpu")
        if network is not None:
            self.hold(network)

    def hold(self, network: nn.Module) -> None:
        """Freeze `network`, put it into eval mode and keep it."""
        object.__setattr__(self, "network", network.requires_grad_(False).eval())
        first: Tensor | None = next(iter(network.parameters()), None)
        if first is not None:
            self.home = first.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # fn may also cast (`.to(bfloat16)`) or forget the values (`.to_empty`): ask it only where things go
        device = fn(torch.empty(1, device=self.home)).device
        if device != self.home and device.type != "meta":
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        self.home = device
        if self.network is not None:
            self.network.to(device)
