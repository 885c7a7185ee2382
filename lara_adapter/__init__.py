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

# A process that serves a policy or talks to one needs none of LARA's parts, so that names are imported on first use: from
# the first of these modules that has them, in the order in which they import each other.
_MODULES = ("errors", "policies", "frames", "losses", "config", "lam", "check", "adapter", "attach")


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f".{module}", __name__) for module in _MODULES)
        value = next(getattr(module, name) for module in modules if hasattr(module, name))
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
