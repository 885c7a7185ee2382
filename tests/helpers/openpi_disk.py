"""A folder with tiny demonstrations, a base model and a LAM for the tests on openpi; made once for all of them.

Import this before anything of openpi or LeRobot: both read where their files are when they are imported.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from examples import openpi_tiny

_kept = tempfile.TemporaryDirectory(prefix="openpi_tiny_")
FOLDER = Path(os.environ.setdefault("LARA_TEST_OPENPI_FOLDER", _kept.name))  # processes of a test have the same
openpi_tiny.use_folder(FOLDER)


@functools.lru_cache(maxsize=1)
def written() -> Path:
    """The folder, with everything in it."""
    if not (FOLDER / "lam").is_dir():
        openpi_tiny.write_all(FOLDER)
    return FOLDER
