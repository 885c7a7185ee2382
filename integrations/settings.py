"""LARA's settings as a dataclass that a command line shows as flags, the same for every host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from lara_adapter import LaraAdapter, LaraArgumentError, LatentActionModel, attach_lara
from lara_adapter.losses import Contrastive

__all__ = ["LaraSettings", "cache_features"]


@dataclass
class LaraSettings:
    """What a command line needs to know of LARA: `attach_lara`'s arguments, and which frames the LAM sees."""

    lam: str = ""
    """Folder or Hub id of the latent action model."""

    layer: int = -3
    """Aligned hidden state: -1 after the last block of the DiT, -3 the paper's (after block L-2)."""

    token: Literal["last_valid", "mean_valid", "last"] = "last_valid"
    """Which action token is aligned; last_valid: the last step of each sample that is not padding."""

    projector: Literal["mlp", "linear"] = "mlp"
    """From hidden state to latent action: mlp (paper) or linear (official release)."""

    alignment: Literal["cosine", "contrastive"] = "cosine"
    """cosine (paper, Eq. 6), or contrastive: in-batch InfoNCE, which does not collapse the LAM."""

    temperature: float = 0.1
    """Of the contrastive alignment."""

    align_weight: float = 0.01
    """w1 of L_ACT + w1 L_LARA + w2 L_LAM."""

    lam_weight: float = 0.01
    """w2 of the same."""

    lam_grad_scale: float = 1.0
    """Factor on the alignment's gradient into the LAM; 1: the paper, 0: stop-gradient."""

    train_lam: bool = True
    """Train the LAM on; False: frozen (paper, Eq. 5)."""

    lam_lr: float | None = None
    """Learning rate of the LAM; None: the run's."""

    views: tuple[str, ...] = ()
    """Cameras that the LAM looks at; none given: the policy's first."""

    horizon: int | None = None
    """C, steps from the present to the future frame; None: the length of the action chunk."""

    frame_size: int | None = None
    """Side in pixels of the frames that travel with the batch; None: the LAM's image size."""

    feature_cache: str | None = None
    """Folder that keeps the features of the LAM's frozen image encoder: no frame is encoded twice."""

    def build_lam(self) -> LatentActionModel:
        """Load the latent action model.

        Raises:
            LaraArgumentError: none is named.
            AdapterFormatError: the folder or repository holds none.
        """
        if not self.lam:
            raise LaraArgumentError(
                "no latent action model is named: --lara.lam FOLDER_OR_HUB_ID (to make one: lara train-lam VIDEOS --output "
                "FOLDER)"
            )
        return LatentActionModel.from_pretrained(self.lam)

    def attach(self, policy: nn.Module, lam: nn.Module) -> LaraAdapter:
        """`attach_lara` with these settings."""
        alignment = Contrastive(self.temperature) if self.alignment == "contrastive" else self.alignment
        lara = attach_lara(
            policy, lam, self.layer, token=self.token, projector=self.projector, alignment=alignment,
            align_weight=self.align_weight, lam_weight=self.lam_weight, lam_grad_scale=self.lam_grad_scale,
            train_lam=self.train_lam,
        )  # fmt: skip
        if self.feature_cache:
            cache_features(lara, self.feature_cache)
        return lara


def cache_features(lara: LaraAdapter, folder: str) -> None:
    """Keep the features of the LAM's frozen image encoder in a folder; see :meth:`LatentActionModel.cache_features`.

    Raises:
        LaraArgumentError: the LAM has no frozen image encoder.
    """
    if not isinstance(lara.lam, LatentActionModel):
        raise LaraArgumentError(f"feature_cache={folder!r}, but a {type(lara.lam).__name__} has no features to keep")
    lara.lam.cache_features(folder)
