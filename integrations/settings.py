"""LARA's settings as a dataclass, which every host's command line shows as flags.

Names and defaults are those of :func:`lara_adapter.attach_lara`; the help of a flag is its line under `Attributes`.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from lara_adapter import LaraAdapter, LaraArgumentError, LaraError, LatentActionModel, attach_lara
from lara_adapter.errors import name_flags
from lara_adapter.losses import Contrastive

from .old_names import accept_old_names

__all__ = ["ATTACH_ARGUMENTS", "LaraSettings", "describe_error", "prepare_lam"]

logger = logging.getLogger(__name__)

_ATTACH = inspect.signature(attach_lara).parameters
ATTACH_ARGUMENTS = frozenset(_ATTACH) - {"policy", "lam"}


def _default(name: str) -> Any:
    return _ATTACH[name].default


@accept_old_names("horizon")
@dataclass
class LaraSettings:
    """Arguments of `attach_lara`, and which frames the LAM sees.

    Attributes:
        lam: folder or Hub id of the latent action model.
        layer: aligned hidden state: -1 after the last block of the DiT, -3 the paper's (after block L-2), k > 0 after
            block k.
        token: which action token is aligned; last_valid: the last step of each sample that is not padding.
        projector: from hidden state to latent action: mlp (paper) or linear (official release).
        alignment: cosine (paper, Eq. 6), or contrastive: in-batch InfoNCE, which does not collapse the LAM.
        temperature: of the contrastive alignment.
        align_weight: w1 of L_ACT + w1 L_LARA + w2 L_LAM.
        lam_weight: w2 of the same.
        lam_grad_scale: factor on the alignment's gradient into the LAM; 1: the paper, 0: stop-gradient.
        reconstruct: part of the pairs that the LAM's forward dynamics see at each step, (0, 1]; 1: all (paper).
        train_lam: train the LAM too; false: frozen (paper, Eq. 5).
        lam_lr: learning rate of the LAM; none: the run's.
        lam_checkpointing: compute the activations of the LAM's layers again in the backward: less memory, more work.
        views: cameras of the LAM's frames; none: the policy's first.
        gap: C, steps from the present to the future frame; none: the length of the action chunk.
        frame_size: side in pixels of the frames that travel with the batch; none: the LAM's image size.
        feature_cache: folder for the features of the LAM's frozen image encoder: no frame is encoded twice.
    """

    lam: str = ""
    layer: int = _default("layer")
    token: Literal["last_valid", "mean_valid", "last"] = _default("token")
    projector: Literal["mlp", "linear"] = _default("projector")
    alignment: Literal["cosine", "contrastive"] = _default("alignment")
    temperature: float = Contrastive.temperature
    align_weight: float = _default("align_weight")
    lam_weight: float = _default("lam_weight")
    lam_grad_scale: float = _default("lam_grad_scale")
    reconstruct: float = _default("reconstruct")
    train_lam: bool = _default("train_lam")
    lam_lr: float | None = None
    lam_checkpointing: bool = False
    views: tuple[str, ...] = ()
    gap: int | None = None
    frame_size: int | None = None
    feature_cache: str | None = None

    def build_lam(self) -> LatentActionModel:
        """Load the latent action model.

        Raises:
            LaraArgumentError: none is named.
            AdapterFormatError: the folder or repository does not hold one.
        """
        if not self.lam:
            raise LaraArgumentError(
                "no latent action model is named: --lara.lam FOLDER_OR_HUB_ID (to make one: lara train-lam VIDEOS --output "
                "FOLDER)"
            )
        return LatentActionModel.from_pretrained(self.lam)

    def frame_size_for(self, lam: nn.Module) -> int:
        """`frame_size`, or the LAM's image size; 224 if the LAM does not state one."""
        config: Any = getattr(lam, "config", None)
        return self.frame_size or int(getattr(config, "image_size", 224))

    def attach(self, policy: nn.Module, lam: nn.Module, **arguments: Any) -> LaraAdapter:
        """:func:`lara_adapter.attach_lara` with these settings; `arguments` take precedence."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name in ATTACH_ARGUMENTS}
        if self.alignment == "contrastive":
            settings["alignment"] = Contrastive(self.temperature)
        lara = attach_lara(policy, lam, **{**settings, **arguments})
        prepare_lam(lara, self.feature_cache, self.lam_checkpointing)
        trainable = sum(p.numel() for p in lara.parameters() if p.requires_grad)
        logger.info("LARA attached at %s: %s trainable parameters", lara.config.tap, f"{trainable:,}")
        return lara


def prepare_lam(lara: LaraAdapter, feature_cache: str | None, lam_checkpointing: bool) -> None:
    """What is set on the LAM of an adapter once it is attached.

    Args:
        lara: the adapter.
        feature_cache: folder of its image encoder's features; see :meth:`LatentActionModel.cache_features`.
        lam_checkpointing: see :meth:`LatentActionModel.checkpoint_layers`.

    Raises:
        LaraArgumentError: the LAM is one of the user's own, or it does not have a frozen image encoder.
    """
    given = {"feature_cache": feature_cache, "lam_checkpointing": lam_checkpointing}
    chosen = [f"{name}={value!r}" for name, value in given.items() if value]
    if not chosen:
        return
    if not isinstance(lara.lam, LatentActionModel):
        raise LaraArgumentError(f"{', '.join(chosen)}, but a {type(lara.lam).__name__} is not a LatentActionModel")
    if lam_checkpointing:
        lara.lam.checkpoint_layers()
    if feature_cache:
        lara.lam.cache_features(feature_cache)


def describe_error(
    error: LaraError, settings: type[Any] = LaraSettings, *, prefix: str = "--lara.", hyphens: bool = True
) -> str:
    """An error in one line, for somebody who typed flags: its kind and message, with flags as they are typed.

    Args:
        error: the error.
        settings: dataclass whose fields the flags are.
        prefix: of each flag.
        hyphens: whether flags have hyphens where fields have underscores.
    """
    names = [field.name for field in fields(settings)]
    return f"{type(error).__name__}: {name_flags(str(error), names, prefix, hyphens)}"
