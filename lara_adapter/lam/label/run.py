"""Latent-action tokens and continuous latents of every frame of a dataset.

The labels of each episode are first kept in a file of their own, in a hidden folder beside the output. When all exist,
the copy (or the sidecar) is written in that folder and renamed to the output. A run can be killed at any time and
resumes where it was, and the output is either complete or missing.

    .OUTPUT.labelling/plan.json            what is being labelled, by which model
    .OUTPUT.labelling/episodes/000012.safetensors
    .OUTPUT.labelling/copy/                the copy while it is built
    OUTPUT.shard-0-of-4/                   a shard: the plan, the episodes, and complete.json when it is done
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from ...data.shard import parse_shard
from ...errors import LaraArgumentError
from ..processes import open_processes
from .decoder import LEAST_R2
from .job import Job
from .report import LabelReport
from .shards import Shard

__all__ = ["LabelReport", "label_dataset"]


def label_dataset(
    dataset: str | os.PathLike[str],
    lam: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    gap: str | int,
    camera: str | None = None,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
    sidecar: bool = False,
    shard: str | None = None,
    merge: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    latent_dtype: Literal["float32", "float16"] = "float32",
    prefix: str = "lara",
    actions: str | os.PathLike[str] | None = None,
    least_r2: float = LEAST_R2,
    link: bool = True,
    picture_fps: float | None = None,
    revision: str | None = None,
    dataset_revision: str | None = None,
) -> LabelReport:
    """Label every frame t of a dataset with the latent action from frame t to frame t + C of its episode.

    Writes a copy of the dataset with the features PREFIX.indices int64 [N], PREFIX.latent [N * D] (token by token) and
    PREFIX.valid bool [1], their statistics, and their provenance in `meta/lara.json`. Where t + C is past the end of the
    episode, the last frame is used instead and valid is False. Frames are resized to the model's size without keeping
    the aspect ratio, as :meth:`LatentActionModel.encode` does.

    With `actions` also the feature action float32 [A], decoded from the latent actions around each frame by a kernel
    regression that is fitted on those demonstrations; PREFIX.action where the dataset has an action already. Its R2 on
    demonstrations left out of the fit is in the provenance. An R2 close to that of a still pair (`lara health` has both)
    is the present frame's, and such labels add nothing to training on the demonstrations alone. A dataset without
    observation.state gets it too: in every frame the mean of the demonstrations, float32, which hides the state.

    A damaged episode is left out and named with its reason, in a warning, the report and `meta/lara.json`. In the copy,
    episodes without labels (damaged, or not selected) have zeros and valid False.

    The same call resumes a killed run, and gives the same bytes on the same machine. Each frame is decoded and encoded
    once. Under `accelerate launch` every process calls this; they share the episodes. Where processes cannot talk to
    each other, each labels a `shard`, and a last call with `merge` writes the output. The bytes are always those of one
    process.

    Args:
        dataset: folder or Hub id of a dataset in the LeRobot format, version 2.0, 2.1 or 3.0; with `sidecar` also one of
            another format, or a folder of videos. It is never written to.
        lam: folder or Hub id of a latent action model.
        output: folder of the copy; with `sidecar` a file that ends in .parquet.
        gap: C, in frames ("16") or seconds ("0.5s"): what the model was trained with.
        camera: key of the camera; None: the only one.
        episodes: numbers of the episodes to label, as "7", or "0:50" without the end; none: all.
        skip: numbers of episodes not to label, likewise.
        sidecar: write only a parquet file with the columns episode_index, frame_index, index, indices, latent, valid; of
            another format than LeRobot's also episode, its name.
        shard: label only this share of the episodes, "0/4" for the first of four, into the folder OUTPUT.shard-0-of-4.
        merge: write the output from the folders of all shards beside it, and remove these.
        batch_size: frames encoded at once; other sizes give the same labels up to rounding.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: the model runs in float32 or under bfloat16 autocast.
        latent_dtype: precision of the stored latent.
        prefix: the features are PREFIX.indices, PREFIX.latent and PREFIX.valid.
        actions: folder or Hub id of demonstrations in the LeRobot format, with the column action, of the same robot and
            with as many frames per second; at least three episodes.
        least_r2: R2 of the decoded actions, on demonstrations left out of the fit, below which nothing is labelled.
        link: hard-link videos where the file system can, instead of copying them.
        picture_fps: frames per second of pictures; None: what the format states, else 30 for folders and 10 for others.
        revision: commit, tag or branch of the model on the Hub.
        dataset_revision: commit, tag or branch of the dataset on the Hub.

    Raises:
        DatasetError: the dataset is missing or of an unknown version, its metadata are damaged, or every episode is.
        AdapterFormatError: the model is missing or damaged.
        LaraArgumentError: no such camera or episode, an argument out of range, an output that is not ours, too little
            disk space, an unfinished labelling with other settings, or shards that are missing or unfinished.
    """
    if latent_dtype not in ("float32", "float16"):
        raise LaraArgumentError(f"latent_dtype={latent_dtype!r}, but float32 or float16 is expected")
    if not prefix or "/" in prefix:
        raise LaraArgumentError(
            f'prefix={prefix!r}, but a name without "/" is expected, as LeRobot demands of features'
        )
    if shard is not None and merge:
        raise LaraArgumentError(f"shard={shard!r} and merge: a shard is labelled by one call, and merged by another")
    part = None if shard is None else Shard(*parse_shard(shard))

    def open_job() -> Job:
        return Job(
            dataset, lam, output, gap=gap, camera=camera, sidecar=sidecar, shard=part, batch_size=batch_size, dtype=dtype,
            latent_dtype=latent_dtype, prefix=prefix, link=link, picture_fps=picture_fps, revision=revision,
            dataset_revision=dataset_revision, actions=actions, least_r2=least_r2,
        )  # fmt: skip

    with open_processes(device) as processes:
        job = processes.each(open_job)
        found = processes.first(lambda: job.begin(episodes, skip, merge, processes.device))
        if isinstance(found, LabelReport):
            return found
        damaged = processes.each(lambda: job.label(found, processes))
        together = {number: reason for each in processes.gather(damaged) for number, reason in each.items()}
        return processes.first(lambda: job.finish(together))
