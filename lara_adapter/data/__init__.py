"""Video and robot datasets on disk: reading frames, and drawing pairs from them in a repeatable order.

Imports torch and numpy only; `av` (video and pictures), `pyarrow` (LeRobot's format), `h5py` and others are imported when
they are used.
"""

from .dataset import Dataset
from .formats import find_sources, open_dataset
from .gap import Gap, parse_gap
from .index import IndexSettings, VideoIndex, build_index, require_pairs
from .pairs import PairBatch, PairStream
from .sources import Segment, Source

__all__ = [
    "Dataset",
    "Gap",
    "IndexSettings",
    "PairBatch",
    "PairStream",
    "Segment",
    "Source",
    "VideoIndex",
    "build_index",
    "find_sources",
    "open_dataset",
    "parse_gap",
    "require_pairs",
]
