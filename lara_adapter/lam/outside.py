"""Frozen networks outside the module tree.

A frozen image encoder can have a hundred times the weights of what is trained. In the module tree it would be part of
every checkpoint, optimizer and FSDP unit, and leave eval mode with each `policy.train()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OutsideTree"]


class OutsideTree(nn.Module):
    """Holds a frozen network that is not part of state_dict, parameters, train, dtype casts or wrappers.

    It moves with this module (or any parent) to another device, stays in eval mode and keeps its dtype.

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
        # fn may also cast (`.to(bfloat16)`) or drop the values (`.to_empty`): take only the device from it
        device = fn(torch.empty(1, device=self.home)).device
        if device != self.home and device.type != "meta":
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        self.home = device
        if self.network is not None:
            self.network.to(device)
