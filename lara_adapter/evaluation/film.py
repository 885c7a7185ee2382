"""Videos of episodes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import HostNotInstalled
from ..storage.files import replace_file

__all__ = ["Film"]

_FPS = 20.0  # about: every n-th step is shown


class Film:
    """Collects every n-th step of an episode and writes an .mp4."""

    def __init__(self, path: Path, fps: float) -> None:
        """Begin a video of `fps` steps of the environment per second, which runs at its speed.

        Raises:
            HostNotInstalled: PyAV is missing.
        """
        try:
            import av  # noqa: F401  (fail now, not after the first episode)
        except ImportError as error:
            raise HostNotInstalled(f"videos need PyAV ({error}): pip install av, or set --videos 0") from error
        self.path, self._skip, self._step = path, max(1, round(fps / _FPS)), 0
        self._fps = fps / self._skip
        self._pictures: list[NDArray[np.uint8]] = []

    def add(self, picture: Callable[[], NDArray[np.uint8]], last: bool = False) -> None:
        """Add the image [H, W, 3] that `picture` returns, if this step is shown."""
        if self._step % self._skip == 0 or last:
            self._pictures.append(picture())
        self._step += 1

    def write(self) -> None:
        """Write the video, atomically."""
        import av

        height, width = (side - side % 2 for side in self._pictures[0].shape[:2])  # the codec needs even sides
        with replace_file(self.path) as fresh, av.open(str(fresh), "w", format="mp4") as container:
            stream = container.add_stream("h264", rate=Fraction(self._fps).limit_denominator(1000))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for picture in self._pictures:
                image = np.ascontiguousarray(picture[:height, :width])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
