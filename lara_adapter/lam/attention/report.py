"""What a latent action model looks at: the attention of its queries over both frames; two models side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ...data import open_dataset
from ...data.dataset import Dataset
from ...data.gap import parse_gap
from ...errors import DatasetError, LaraArgumentError
from ...storage.files import replace_file
from ..identity import open_model
from ..model import LatentActionModel
from ..sequence import choose_device

__all__ = ["AttentionReport", "ModelAttention", "measure_attention", "save_arrays"]


class ModelAttention(NamedTuple):
    """One model's attention over P pairs of frames.

    name: Hub id or folder's name; `identity`: see :func:`~lara_adapter.lam.identity.open_model`.
    attention: [P, layers, heads, N, 2, h, w] float32, over the patches of (present, future) in reading order.
    rest: [P, layers, heads, N] float32, what went to other tokens (queries, separator, CLS): with `attention` summed over
        its last three axes it makes 1.
    """

    name: str
    identity: dict[str, Any]
    attention: np.ndarray
    rest: np.ndarray

    def maps(self, layer: int = -1) -> np.ndarray:
        """[P, N, 2, h, w]: one layer's mean over the heads, over the patches alone; sums to 1 over (2, h, w)."""
        mean = self.attention[:, layer].mean(axis=1)
        return mean / mean.sum(axis=(2, 3, 4), keepdims=True)


class AttentionReport(NamedTuple):
    """Pairs of frames and what one model, or two, looked at.

    data: name of the dataset or video.
    pairs: (clip's name, place t) of each of the P pairs.
    gap: C in frames.
    present: P frames [H, W, 3] uint8; `future` likewise.
    models: one entry per model.
    layer: of the M-Former, for pictures and numbers; -1: the last.
    """

    data: str
    pairs: list[tuple[str, int]]
    gap: int
    present: list[np.ndarray]
    future: list[np.ndarray]
    models: list[ModelAttention]
    layer: int

    def numbers(self) -> list[dict[str, Any]]:
        """Per model: mean over pairs and queries of where it looks.

        Returns:
            `model`; `present`: share of the attention on the present frame; `on_motion`: attention on the patches that
            change, over evenly spread attention (1: no preference; None: nothing moves); `entropy`: of the maps, over
            that of evenly spread ones (1: spread, 0: one patch).
        """
        numbers = []
        for model in self.models:
            maps = model.maps(self.layer)
            flat = maps.reshape(*maps.shape[:2], -1)
            entropy = -(flat * np.log(np.clip(flat, 1e-12, None))).sum(-1) / np.log(flat.shape[-1])
            ratios = []
            for pair, (now, later) in zip(maps, zip(self.present, self.future)):
                moved = _motion(now, later, (maps.shape[-2], maps.shape[-1]))
                if moved.any():
                    ratios.append(pair[:, :, moved].sum(axis=(1, 2)).mean() / moved.mean())
            numbers.append({
                "model": model.name, "present": float(maps[:, :, 0].sum(axis=(2, 3)).mean()),
                "on_motion": float(np.mean(ratios)) if ratios else None, "entropy": float(entropy.mean()),
            })  # fmt: skip
        return numbers


def measure_attention(
    lam: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    gap: str | int,
    compare: str | os.PathLike[str] | None = None,
    frames: Sequence[str] = (),
    pairs: int = 6,
    layer: int = -1,
    camera: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    episodes: Sequence[str] = (),
    skip: Sequence[str] = (),
    picture_fps: float | None = None,
) -> AttentionReport:
    """Run one or two models on the same pairs of frames and keep what their queries look at.

    Args:
        lam: folder or Hub id of a latent action model.
        data: dataset (folder, file, or Hub id of one in the LeRobot format), folder of videos, or one video.
        gap: distance between the frames of a pair, in frames ("16") or seconds ("0.5s").
        compare: another model, for instance the LARA-LAM that joint training made of the first.
        frames: which pairs, each "CLIP:FRAME" (number of the episode, or of the video in the order of names, and t) or
            "FRAME" (of the first clip); none: `pairs` of them, spread evenly.
        pairs: how many pairs without `frames`.
        layer: of the M-Former, from 0, or from the last as -1.
        camera: key of the dataset's camera; None: the only one.
        device: "auto", "cpu", "cuda" or "cuda:1".
        revision: commit, tag or branch of `lam` on the Hub.
        episodes: numbers of the episodes to take pairs from, as "7" or "0:50"; none: all.
        skip: numbers of those to leave out.
        picture_fps: frames per second of pictures; None: what the format states, else 30 for folders and 10 for others.

    Raises:
        DatasetError: there is nothing that can be read.
        AdapterFormatError: a model is missing or damaged.
        LaraArgumentError: an argument out of range; no such clip or frame.
    """
    if pairs < 1:
        raise LaraArgumentError(f"pairs={pairs}, but at least 1 is expected")
    source = open_dataset(data, picture_fps=picture_fps, episodes=episodes, skip=skip)
    view = source.camera(camera)
    distance = parse_gap(gap).in_frames(source.fps)
    places = [_parse(text, source) for text in frames] or _spread(source, distance, pairs)
    models = [open_model(name, version) for name, version in ((lam, revision), (compare, None)) if name is not None]
    for model, identity in models:
        layers = model.config.idm_layers
        if not -layers <= layer < layers:
            raise LaraArgumentError(
                f"layer={layer}, but {identity['source']} has {layers}: 0 to {layers - 1}, or -1 ..."
            )
    shown = _read(source, view, places, distance)
    target = choose_device(device)
    present, future = [pair[0] for _, pair in shown], [pair[1] for _, pair in shown]
    maps = [_run(model.to(target), identity, present, future) for model, identity in models]
    if len(maps) == 2 and maps[0].name == maps[1].name:  # folders of one name: distinguished by their weights
        maps = [one._replace(name=f"{one.name} {one.identity['weights_sha256'][:8]}") for one in maps]
    return AttentionReport(source.name, [name for name, _ in shown], distance, present, future, maps, layer)


def save_arrays(report: AttentionReport, path: str | os.PathLike[str]) -> None:
    """Write the arrays as .npz, atomically; read it with `numpy.load(path)`, without pickle.

    Keys: clip [P] text, frame [P] int64, gap int64; present and future [P, H, W, 3] uint8 (where all frames have one
    size; otherwise present_0, present_1, ...); for each model i = 0, 1: model_i text, attention_i and rest_i as in
    :class:`ModelAttention`, and maps_i [P, N, 2, h, w], which sum to 1.
    """
    arrays: dict[str, np.ndarray] = {
        "clip": np.array([name for name, _ in report.pairs]),
        "frame": np.array([place for _, place in report.pairs]),
        "gap": np.array(report.gap),
    }
    for name, pictures in (("present", report.present), ("future", report.future)):
        if len({picture.shape for picture in pictures}) == 1:
            arrays[name] = np.stack(pictures)
        else:
            arrays.update({f"{name}_{number}": picture for number, picture in enumerate(pictures)})
    for number, model in enumerate(report.models):
        arrays[f"model_{number}"] = np.array(model.name)
        arrays[f"attention_{number}"], arrays[f"rest_{number}"] = model.attention, model.rest
        arrays[f"maps_{number}"] = model.maps(report.layer)
    with replace_file(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _spread(source: Dataset, gap: int, pairs: int) -> list[tuple[Any, int]]:
    """Pairs (episode, t) evenly over all places that have a partner."""
    lengths = [episode.length for episode in source.episodes]
    counts = [max(0, length - gap) for length in lengths]
    total = sum(counts)
    if not total:
        raise DatasetError(f"no clip is longer than the frame gap of {gap}; the longest has {max(lengths)}")
    ends = np.cumsum(counts)
    spread = []
    for place in sorted({int((number + 0.5) * total / pairs) for number in range(pairs)}):
        clip = int(np.searchsorted(ends, place, side="right"))
        spread.append((source.episodes[clip], place - int(ends[clip]) + counts[clip]))
    return spread


def _parse(text: str, source: Dataset) -> tuple[Any, int]:
    head, _, tail = text.rpartition(":")
    try:
        number, place = int(head or source.episodes[0].number), int(tail)
    except ValueError:
        number = place = -1
    if number < 0 or place < 0:
        raise LaraArgumentError(f'frames: {text!r}, but "CLIP:FRAME" or "FRAME" is expected, two numbers from 0 on')
    episode = source.episode(number)
    if episode is None:
        raise LaraArgumentError(
            f"frames: {text!r}, but {source.name} has {len(source.episodes)} clips, and not this one"
        )
    return episode, place


def _read(
    source: Dataset, camera: str, places: list[tuple[Any, int]], gap: int
) -> list[tuple[tuple[str, int], tuple[np.ndarray, np.ndarray]]]:
    """(name of the episode, t) and both frames of each pair, without those of damaged episodes, which are left out."""
    frames: dict[int, dict[int, np.ndarray]] = {}
    damaged: dict[int, str] = {}
    for episode in {episode.number: episode for episode, _ in places}.values():
        needed = [t + shift for other, t in places if other.number == episode.number for shift in (0, gap)]
        try:
            frames[episode.number] = source.pick(camera, episode, needed)
        except DatasetError as error:
            damaged[episode.number] = str(error)
    source.leave_out(damaged)
    shown = []
    for episode, place in places:
        if episode.number in damaged:
            continue
        picked = frames[episode.number]
        if place + gap not in picked:
            raise LaraArgumentError(
                f"frames: {episode.name} has no frame {place + gap}, which is {gap} after frame {place}; take an "
                "earlier one"
            )
        shown.append(((episode.name, place), (picked[place], picked[place + gap])))
    if not shown:
        raise DatasetError(f"{source.name}: none of the episodes that were chosen can be decoded")
    return shown


@torch.no_grad()
def _run(
    model: LatentActionModel, identity: dict[str, Any], present: list[np.ndarray], future: list[np.ndarray]
) -> ModelAttention:
    device = next(model.parameters()).device
    maps = []
    for now, later in zip(present, future):
        images = [torch.from_numpy(frame).permute(2, 0, 1)[None].to(device) for frame in (now, later)]
        maps.append(model.attention(*images).cpu())
    attention = torch.cat(maps).numpy()
    return ModelAttention(identity["source"], identity, attention, 1 - attention.sum(axis=(4, 5, 6)))


def _motion(now: np.ndarray, later: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[h, w] bool: the patches of which at least a tenth of the pixels changed by more than a tenth of the range."""
    change = np.abs(later.astype(np.float32) - now.astype(np.float32)).max(axis=2) > 25.5
    share = F.adaptive_avg_pool2d(torch.from_numpy(change)[None, None].float(), grid)
    return (share[0, 0] >= 0.1).numpy()
