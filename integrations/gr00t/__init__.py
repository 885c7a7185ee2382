"""LARA for NVIDIA Isaac GR00T (N1.6): frames from its dataset, its own training run with LARA, and a clean export.

Importing this package needs no gr00t; what needs it says so. The guide is docs/hosts/gr00t.md.
"""

from ..hosts import lazy

__all__ = [
    "INSTALL", "EpisodeFrames", "LaraCallback", "LaraPipeline", "LaraSettings", "LoraSettings", "add_frames",
    "export_policy", "lara_experiment", "run", "wrap_in_lora",
]  # fmt: skip

__getattr__ = lazy(
    __name__, export="export_policy", frames="EpisodeFrames add_frames",
    train="INSTALL LaraCallback LaraPipeline LaraSettings LoraSettings lara_experiment run wrap_in_lora",
)  # fmt: skip
