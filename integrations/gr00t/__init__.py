"""LARA for NVIDIA Isaac GR00T (N1.6): frames from its dataset, its own training run with LARA, and a clean export.

Importing this package needs no gr00t; what needs it says so. The guide is README.md beside this file.
"""

from ..settings import LaraSettings
from ..trainer import LaraCallback
from .export import export_policy
from .frames import EpisodeFrames, add_frames
from .run import INSTALL, LaraPipeline, LoraSettings, lara_experiment, run, wrap_in_lora

__all__ = [
    "INSTALL", "EpisodeFrames", "LaraCallback", "LaraPipeline", "LaraSettings", "LoraSettings", "add_frames",
    "export_policy", "lara_experiment", "run", "wrap_in_lora",
]  # fmt: skip
