"""Present and future frames for the latent action model, from GR00T's own dataset, out of the policy's sight.

GR00T hands every frame of a sample to its vision-language model, so the future frame must not be asked for through the
modality configuration (the saved processor would also expect it at inference). It is taken from the decoded episode
after GR00T has made its own sample; the policy's input is bit-identical to stock GR00T's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lara_adapter import FrameError
from lara_adapter.lam.pixels import resize

from ..frames import FRAMES, VALID, check_gap, check_positive
from ..old_names import accept_old_names

__all__ = ["EpisodeFrames", "add_frames"]

logger = logging.getLogger(__name__)

_SHARDS_IN_MEMORY = 2  # GR00T keeps one shard of finished samples and prepares the next


class EpisodeFrames:
    """Replaces `get_datapoint` of one GR00T dataset: its sample, and the pair of frames. Picklable, for spawned workers.

    Attributes:
        dataset: a ShardedSingleStepDataset, or another with its `get_datapoint` and `modality_configs`.
        views: names of the video modality, in the order of the view axis.
        gap: C, the steps between the two frames.
        frame_size: side in pixels of the square frames.
    """

    def __init__(self, dataset: Any, views: Sequence[str], gap: int, frame_size: int) -> None:
        self.dataset, self.views, self.gap, self.frame_size = dataset, tuple(views), gap, frame_size

    def __call__(self, episode_data: Any, step_index: int) -> dict[str, Any]:
        """GR00T's sample of step t, with two more keys.

        Args:
            episode_data: table of the whole episode, one row a step; frames are uint8 [H, W, 3].
            step_index: t.

        Returns:
            The sample with `lara_frames`, uint8 [2, 3, S, S] or [V, 2, 3, S, S] for V > 1 views, and `lara_frames_valid`,
            bool: False where t + C is past the end of the episode (the future frame is then the episode's last).
        """
        sample = type(self.dataset).get_datapoint(self.dataset, episode_data, step_index)
        last, step = len(episode_data) - 1, int(step_index)
        pairs = []
        for view in self.views:
            column = episode_data[f"video.{view}"]
            pair = np.stack([column.iloc[step], column.iloc[min(step + self.gap, last)]])
            if getattr(self.dataset, "video_backend", None) == "opencv":
                # gr00t/utils/video_utils.py returns what cv2 decodes, which is BGR; a LAM is trained on RGB
                pair = np.ascontiguousarray(pair[..., ::-1])  # torch refuses a negative stride
            pairs.append(resize(torch.from_numpy(pair).permute(0, 3, 1, 2), self.frame_size))
        frames = torch.stack(pairs).numpy()
        # every sample has both keys: the collator stacks a key that only some have to a smaller batch, silently
        sample[FRAMES] = frames[0] if len(frames) == 1 else frames
        sample[VALID] = np.bool_(step + self.gap <= last)
        return sample


@accept_old_names("horizon", "size")
def add_frames(
    dataset: Any,
    *,
    views: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    gap: int | None = None,
    frame_size: int = 224,
) -> list[EpisodeFrames]:
    """Make a GR00T dataset yield frames for LARA; processor, collator and configurations do not change.

    Memory: GR00T keeps finished samples of two shards in each worker; V views add V * 6 * frame_size^2 bytes to each
    sample (301 kB for one view of 224 pixels: 0.6 GB a worker at the default of 1024 steps a shard). The sum is logged.

    Args:
        dataset: a ShardedMixtureDataset (pipeline.return_dataset()[0]) or a single ShardedSingleStepDataset; not
            iterated yet.
        views: names of the video modality for the LAM, or such a list for each embodiment tag; None: the first
            view of each dataset. All datasets of a mixture must give the same number of views.
        gap: C, steps from the present to the future frame; None: the length of the dataset's action chunk.
        frame_size: side in pixels of the square frames, best the LAM's `image_size`.

    Returns:
        One for each dataset of the mixture.

    Raises:
        LaraArgumentError: an argument outside the above, or no episode of a dataset is longer than C.
        FrameError: a view that the dataset does not load, different numbers of views, or frames are added already.
    """
    check_positive("add_frames", gap=1 if gap is None else gap, frame_size=frame_size)
    parts = list(getattr(dataset, "datasets", [dataset]))
    placed = []
    for part in parts:
        if isinstance(vars(part).get("get_datapoint"), EpisodeFrames):
            raise FrameError("add_frames: this dataset yields frames for LARA already")
        names = _choose_views(part, views)
        chunk = part.modality_configs["action"].delta_indices
        steps = (max(chunk) - min(chunk) + 1) if gap is None else gap
        longest = max(getattr(getattr(part, "episode_loader", None), "episode_lengths", ()), default=None)
        if longest is not None:
            check_gap("add_frames", steps, longest, getattr(part, "dataset_path", "the dataset"))
        placed.append(EpisodeFrames(part, names, steps, frame_size))
    counts = sorted({len(frames.views) for frames in placed})
    if len(counts) > 1:
        raise FrameError(
            f"add_frames: datasets of this mixture give {counts} views, which do not fit into one batch; "
            "pass views={embodiment tag: [...]} with equally many names for each"
        )
    for frames in placed:
        frames.dataset.get_datapoint = frames  # the instance's own: any subclass of the dataset keeps its methods
        sample = len(frames.views) * 6 * frame_size**2
        logger.info(
            "LARA frames of %s: views %s, t and t+%d, %d x %d: %.0f kB a sample, up to %.2f GB in each data worker",
            getattr(frames.dataset, "dataset_path", "the dataset"), list(frames.views), frames.gap, frame_size, frame_size,
            sample / 1e3, sample * _SHARDS_IN_MEMORY * getattr(frames.dataset, "shard_size", 0) / 1e9,
        )  # fmt: skip
    return placed


def _choose_views(dataset: Any, views: Sequence[str] | Mapping[str, Sequence[str]] | None) -> tuple[str, ...]:
    loaded = list(dataset.modality_configs["video"].modality_keys)
    tag = str(getattr(getattr(dataset, "embodiment_tag", None), "value", ""))
    if isinstance(views, str):
        views = [views]
    if isinstance(views, Mapping):
        if tag not in views:
            raise FrameError(f"add_frames: views has no entry for the embodiment {tag!r}; it has {sorted(views)}")
        views = views[tag]
    names = tuple(views or loaded[:1])
    missing = [view for view in names if view not in loaded]
    if missing or not names:
        raise FrameError(
            f"add_frames: views {missing} are not loaded for {tag or 'this dataset'}, which has {loaded}. "
            "Only the views of the policy itself are decoded"
        )
    return names
