"""Pre-training of a latent action model on unlabelled video (LARA, stage 1)."""

from .run import pretrain_lam
from .settings import PretrainSettings

__all__ = ["PretrainSettings", "pretrain_lam"]
