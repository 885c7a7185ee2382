"""The perceptual term that the release adds to LARA, Eq. 3: LPIPS on VGG features, optional and lazily loaded."""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LaraArgumentError
from .outside import OutsideTree
from .transformer import float32_default

__all__ = ["PerceptualDistance"]

logger = logging.getLogger(__name__)


class _Narrow(nn.Module):
    """A trunk that runs in bfloat16, with activations given in float32."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> list[Tensor]:
        """One tensor for each layer that is compared."""
        with torch.autocast(images.device.type, torch.bfloat16):
            layers: Any = self.trunk(images)
        return [layer.float() for layer in layers]


class PerceptualDistance(OutsideTree):
    """LPIPS (VGG) between images in [0, 1], outside the module tree.

    The package `lpips` and its weights (VGG16, 528 MB) are loaded at the first use, because encoding frames does not need
    them. If that fails (a cluster without network can still train), one warning is logged and the distance is 0.

    Under the host's bfloat16 autocast VGG runs in bfloat16, as in the release; what is done with its activations stays
    float32.

    Attributes:
        checkpointing: VGG's activations are computed again in the backward, and not kept.
    """

    _narrow: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.tried = self.checkpointing = False
        object.__setattr__(self, "_narrow", None)

    def hold(self, network: nn.Module) -> None:
        """Freeze `network` and keep it, and a second way through it: the same weights, with its trunk in bfloat16."""
        super().hold(network)
        trunk = getattr(network, "net", None)
        narrow: nn.Module | None = None
        if isinstance(trunk, nn.Module):
            narrow = copy.copy(network)  # which shares every part
            narrow._modules = {**network._modules, "net": _Narrow(trunk).eval()}
        object.__setattr__(self, "_narrow", narrow)

    def load(self) -> bool:
        """Load LPIPS now, once; call it before torch.compile. Returns whether the term is on."""
        if not self.tried:
            self.tried = True
            try:
                import lpips

                with float32_default("cpu"):
                    self.hold(lpips.LPIPS(net="vgg", verbose=False).float())
            except (ImportError, OSError, RuntimeError) as error:
                logger.warning(
                    "The perceptual loss is OFF: LPIPS cannot be loaded (%s: %s). Install lpips and torchvision and "
                    "let the VGG16 weights download once, or set perceptual_weight=0 to silence this.",
                    type(error).__name__,
                    error,
                )
        return self.network is not None

    def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Distance per sample.

        Args:
            predicted: [B, 3, S, S] float32; its gradient flows.
            target: [B, 3, S, S] float32, [0, 1].

        Returns:
            [B] float32, zeros where LPIPS is not available.

        Raises:
            LaraArgumentError: first used inside torch.compile, which cannot trace the loading.
        """
        if not self.tried:
            if torch.compiler.is_compiling():
                raise LaraArgumentError("perceptual_weight > 0: call lam.perceptual.load() before torch.compile")
            self.load()
        if self.network is None:
            return predicted.new_zeros(predicted.shape[0])
        if self.home != predicted.device:
            self._move(predicted.device)
        kind = predicted.device.type
        narrow = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        network = self._narrow if narrow and self._narrow is not None else self.network
        with torch.autocast(kind, enabled=False):
            if self.checkpointing and torch.is_grad_enabled():
                run = partial(checkpoint, network, use_reentrant=False, preserve_rng_state=False)
                distance: Tensor = run(predicted, target, normalize=True)
            else:
                distance = network(predicted, target, normalize=True)
        return distance.flatten()
