"""LARA for openpi: pi0 and pi0.5 in PyTorch, trained by openpi's own loop on its own data pipeline.

Importing this package needs no openpi; what needs it says so. The guide is docs/hosts/openpi.md.
"""

from .. import hosts
from .checkpoints import load_policy, save_policy
from .frames import FramePlan, KeepFrames, observation_frames
from .loader import LaraDataLoader, create_data_loader
from .script import find_training_script
from .train import OpenpiLaraSettings, attach, lara_training, run

INSTALL = f"openpi is not installed: {hosts.INSTALL['openpi']}"

__all__ = [
    "INSTALL", "FramePlan", "KeepFrames", "LaraDataLoader", "OpenpiLaraSettings", "attach", "create_data_loader",
    "find_training_script", "lara_training", "load_policy", "observation_frames", "run", "save_policy",
]  # fmt: skip
