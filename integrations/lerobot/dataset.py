"""The pair of frames (now, C steps later) for LARA, from a LeRobotDataset whose own items do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from torch.utils.data import Dataset, get_worker_info

from lara_adapter.errors import FrameError, LaraArgumentError
from lara_adapter.lam.feature_reader import FeatureReader
from lara_adapter.lam.pixels import resize

from ..frames import check_gap, check_positive, to_uint8
from ..old_names import accept_old_names

__all__ = ["FRAMES", "VALID", "LaraDataset", "resolve_views"]

# LeRobot's processors keep only keys that begin with `observation.`, and GR00T takes every `observation.images*` for
# one more camera of its own
FRAMES = "observation.lara.frames"
VALID = f"{FRAMES}_valid"


class LaraDataset(Dataset):
    """A LeRobotDataset with two more keys in each item; all other keys are what LeRobot itself returns.

    `observation.lara.frames`: uint8 [2, 3, H, W] (now, C steps later; never augmented), or [V, 2, 3, H, W] of V
    cameras. `observation.lara.frames_valid`: bool, False where C steps later is past the end of the episode; the future
    frame is then a copy of the present one.

    LeRobot's `delta_timestamps` would put the future frame into the camera's own key, where SmolVLA and X-VLA silently
    take it for the present one. Other attributes are the wrapped dataset's, so that LeRobot's samplers and training loop
    can use this in its place. Picklable, for spawned workers.

    Attributes:
        dataset: the wrapped dataset.
        views: the cameras' keys.
        gap: C, in frames.
        frame_size: (height, width) in pixels of the frames, or None: as recorded.
        reader: adds the cached features of the LAM's image encoder in the data loader's workers; None: nothing does.
    """

    @accept_old_names("camera", "horizon", "size")
    def __init__(
        self,
        dataset: LeRobotDataset,
        *,
        gap: int,
        views: str | Sequence[str] | None = None,
        frame_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Wrap a dataset.

        Args:
            dataset: video or image dataset, whole or with `episodes=[...]`. Wrap it first, then make a Subset of it.
            gap: C >= 1, frames between the two; the paper takes the length of the policy's action chunk.
            views: key of a camera ("observation.images.top", or its last part "top"), several keys for several views,
                or "all"; None: the only one.
            frame_size: resize to this height and width (an int: square), as the LAM would later; None: as recorded.

        Raises:
            LaraArgumentError: a streaming or foreign dataset, a camera that does not exist or must be chosen, or no
                episode longer than the gap.
        """
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise LaraArgumentError(
                f"LaraDataset: a {type(dataset).__name__} streams its frames and cannot look C steps ahead; use a "
                "LeRobotDataset on disk (--dataset.streaming=false)"
            )
        if not isinstance(dataset, LeRobotDataset):
            raise LaraArgumentError(
                f"LaraDataset: dataset is a {type(dataset).__name__}, but a LeRobotDataset is expected (wrap that one, "
                "then Subset or ConcatDataset)"
            )
        check_positive("LaraDataset", gap=gap)
        self.dataset = dataset
        self.reader: FeatureReader | None = None
        self.gap = gap
        self.frame_size = _check_size(frame_size)
        self.views = resolve_views(dataset.meta, views)
        shapes = {name: tuple(dataset.meta.features[name]["shape"]) for name in self.views}
        if self.frame_size is None and len(set(shapes.values())) > 1:
            raise LaraArgumentError(f"LaraDataset: cameras of different shapes {shapes}; pass frame_size=")
        self._ends = list(dataset.meta.episodes["dataset_to_index"])
        starts = list(dataset.meta.episodes["dataset_from_index"])
        episodes = range(len(starts)) if dataset.episodes is None else dataset.episodes
        check_gap("LaraDataset", gap, max((self._ends[e] - starts[e] for e in episodes), default=0))
        # decoded one by one: a whole row would decode the images of the other cameras too
        self._images = {
            name: dataset.hf_dataset.select_columns([name]) for name in self.views if name in dataset.meta.image_keys
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # before unpickling has restored `dataset`, a look-up of it would recurse; and torch's loader asks for the
        # dunder `__getitems__`, which must not be another's
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int | slice) -> Any:
        """One item, or a list of items for a slice.

        Raises:
            FrameError: a camera whose frames are not RGB.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self.dataset[index]
        episode, now = int(item["episode_index"]), int(item["index"])  # `index` counts from the dataset's first frame
        valid = now + self.gap < self._ends[episode]
        views = torch.stack([self._pair(item, name, episode, now, valid) for name in self.views])
        if self.frame_size is not None:
            views = resize(views, self.frame_size)
        return {**item, FRAMES: views[0] if len(views) == 1 else views, VALID: torch.tensor(valid)}

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch, as a data loader asks for them; in its workers with cached features, if all are known."""
        items = [self[index] for index in indices]
        return items if self.reader is None or get_worker_info() is None else self.reader.add_to(items)

    def _pair(self, item: dict[str, Any], camera: str, episode: int, now: int, valid: bool) -> torch.Tensor:
        """Frames [2, 3, H, W] uint8 of one camera."""
        present = self._in_item(item, camera)
        missing = [] if present is not None else [now]
        missing += [now + self.gap] if valid else []
        frames = [*([] if present is None else [present]), *(self._read(camera, episode, missing) if missing else [])]
        # image datasets hand out float in [0, 1], k / 255, even where uint8 was asked for
        pair = torch.stack([to_uint8(frame) for frame in (frames[0], frames[-1])])
        if pair.ndim != 4 or pair.shape[1] != 3:
            shape = list(pair.shape[1:])
            raise FrameError(
                f"{camera} of frame {now} has shape {shape}, but [3, H, W] is expected; choose another camera"
            )
        return pair

    def _in_item(self, item: dict[str, Any], camera: str) -> torch.Tensor | None:
        """The present frame, if the policy's own item holds it without augmentation."""
        if self.dataset.image_transforms is not None:
            return None
        frame = item[camera]
        deltas = (self.dataset.delta_timestamps or {}).get(camera, [0.0])
        steps = zip(deltas, frame[None] if frame.ndim == 3 else frame)
        return next((step for delta, step in steps if abs(delta) < 0.5 / self.dataset.fps), None)

    def _read(self, camera: str, episode: int, indices: list[int]) -> list[torch.Tensor]:
        """Frames of one episode by their index in the whole dataset."""
        relative = self.dataset.absolute_to_relative_idx
        rows = [i if relative is None else relative[i] for i in indices]
        if camera in self._images:
            return [self._images[camera][row][camera] for row in rows]
        meta = self.dataset.meta
        times = self.dataset.hf_dataset.data.column("timestamp")
        start = meta.episodes[episode][f"videos/{camera}/from_timestamp"]  # a file holds several episodes
        path = self.dataset.root / meta.get_video_file_path(episode, camera)
        backend = getattr(self.dataset, "_video_backend", None)
        # one query for each: in a common one pyav would decode all frames between the two, and torchcodec, which keeps
        # its decoder, gains nothing
        stamps = [start + times[row].as_py() for row in rows]
        return [decode_video_frames(path, [t], self.dataset.tolerance_s, backend, return_uint8=True)[0] for t in stamps]

    def __repr__(self) -> str:
        return f"LaraDataset({self.dataset!r}, views={self.views}, gap={self.gap}, frame_size={self.frame_size})"


def resolve_views(meta: Any, views: str | Sequence[str] | None) -> list[str]:
    """Keys of the cameras that `views` names (see :class:`LaraDataset`).

    Raises:
        LaraArgumentError: there is none, several fit, or one does not exist; the message lists them.
    """
    known = [name for name in meta.camera_keys if name not in meta.depth_keys]
    if views is None or views == "all":
        if len(known) == 1 or (known and views == "all"):
            return known
        what = f"choose one of {known}, several, or 'all'" if known else "LARA needs one"
        raise LaraArgumentError(f"the dataset has {len(known)} colour cameras; {what} (views=, --lara.views=)")
    keys = []
    for name in [views] if isinstance(views, str) else views:
        matching = [key for key in known if key == name] or [key for key in known if key.rpartition(".")[2] == name]
        if len(matching) != 1:
            raise LaraArgumentError(f"views={name!r}, but the dataset's colour cameras are {known}")
        keys += matching
    if not keys or len(set(keys)) != len(keys):
        raise LaraArgumentError(f"views={views!r}, but one or several different ones of {known} are expected")
    return keys


def _check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise LaraArgumentError(f"frame_size={size!r}, but pixels >= 1 or (height, width) is expected")
    return pair
