"""LARA, Latent Action Representation Alignment, for any diffusion-transformer robot policy.

from lara_adapter import LatentActionModel, attach_lara

lam = LatentActionModel.from_pretrained("user/lam")
lara = attach_lara(policy, lam, layer=-3)
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .adapter import LaraAdapter, LaraLosses
    from .attach import attach_lara, load_lara
    from .check import CheckReport
    from .config import LaraConfig
    from .errors import (
        AdapterFormatError,
        AttachOrderError,
        DatasetError,
        FrameError,
        HostNotInstalled,
        HostOutputError,
        HubError,
        LaraArgumentError,
        LaraError,
        NonFiniteError,
        OptimizerCoverageError,
        PolicySourceError,
        ServingError,
        ServingTimeout,
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
    "DatasetError",
    "FrameError",
    "FramePair",
    "HostNotInstalled",
    "HostOutputError",
    "HubError",
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
    "PolicySourceError",
    "PolicySpec",
    "ServingError",
    "ServingTimeout",
    "TapDetached",
    "TapNeverFired",
    "TapNotFound",
    "TokenError",
    "attach_lara",
    "load_lara",
    "register_policy",
]

# Loaded when first asked for: a process that serves a policy or talks to one needs none of LARA's parts.
_HOMES = {
    "adapter": "LaraAdapter LaraLosses",
    "attach": "attach_lara load_lara",
    "check": "CheckReport",
    "config": "LaraConfig",
    "errors": (
        "AdapterFormatError AttachOrderError DatasetError FrameError HostNotInstalled HostOutputError HubError "
        "LaraArgumentError LaraError NonFiniteError OptimizerCoverageError PolicySourceError ServingError ServingTimeout "
        "TapDetached TapNeverFired TapNotFound TokenError"
    ),
    "frames": "FramePair",
    "lam": "LatentAction LatentActionConfig LatentActionModel LatentActionOutput",
    "losses": "Contrastive",
    "policies": "PolicySpec register_policy",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
