"""LARA for openpi: pi0 and pi0.5 in PyTorch, trained by openpi's own loop on its own data pipeline.

Importing this package needs no openpi; what needs it says so. The guide is README.md beside this file.
"""

INSTALL = (
    "openpi is not installed (`import openpi` fails): git clone https://github.com/Physical-Intelligence/openpi and "
    "install it as its README says, with its patched transformers (src/openpi/models_pytorch/transformers_replace), or "
    "pip install rlinf-openpi==0.1.1 rlinf-transformer-openpi==4.53.2 lerobot==0.3.3, and pip install lara-adapter into "
    "the same environment; tested with Python 3.12, torch 2.7.1"
)

from .checkpoints import load_policy, save_policy  # noqa: E402
from .frames import FramePlan, KeepFrames, observation_frames  # noqa: E402
from .loader import LaraDataLoader, create_data_loader  # noqa: E402
from .run import OpenpiLaraSettings, attach, lara_training, run  # noqa: E402
from .script import find_training_script  # noqa: E402

__all__ = [
    "INSTALL",
    "FramePlan",
    "KeepFrames",
    "LaraDataLoader",
    "OpenpiLaraSettings",
    "attach",
    "create_data_loader",
    "find_training_script",
    "lara_training",
    "load_policy",
    "observation_frames",
    "run",
    "save_policy",
]
