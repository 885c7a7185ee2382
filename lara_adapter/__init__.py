"""LARA, Latent Action Representation Alignment, for any diffusion-transformer robot policy.

from lara_adapter import LatentActionModel, attach_lara

lam = LatentActionModel.from_pretrained("user/lam")
lara = attach_lara(policy, lam, layer=-3)
"""

__version__ = "0.1.0"

from .adapter import LaraAdapter, LaraLosses
from .attach import attach_lara, load_lara
from .check import CheckReport
from .config import LaraConfig
from .errors import (
    AdapterFormatError,
    AttachOrderError,
    FrameError,
    HostOutputError,
    LaraArgumentError,
    LaraError,
    NonFiniteError,
    OptimizerCoverageError,
    TapDetached,
    TapNeverFired,
    TapNotFound,
    TokenError,
)
from .frames import FramePair
from .lam import LatentAction, LatentActionConfig, LatentActionModel, LatentActionOutput
from .losses import Contrastive
from .policies import PolicySpec, register_policy

__all__ = [
    "AdapterFormatError",
    "AttachOrderError",
    "CheckReport",
    "Contrastive",
    "FrameError",
    "FramePair",
    "HostOutputError",
    "LaraAdapter",
    "LaraArgumentError",
    "LaraConfig",
    "LaraError",
    "LaraLosses",
    "LatentAction",
    "LatentActionConfig",
    "LatentActionModel",
    "LatentActionOutput",
    "NonFiniteError",
    "OptimizerCoverageError",
    "PolicySpec",
    "TapDetached",
    "TapNeverFired",
    "TapNotFound",
    "TokenError",
    "attach_lara",
    "load_lara",
    "register_policy",
]
