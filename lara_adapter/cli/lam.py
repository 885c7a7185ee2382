"""The commands `lara label`, `lara health` and `lara attention`: a result on stdout, and an exit status."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import LaraArgumentError
from .output import to_json, write

__all__ = ["attention", "health", "label"]


def label(
    dataset: str,
    /,
    *,
    lam: str,
    output: str,
    gap: str,
    camera: str | None = None,
    sidecar: bool = False,
    batch_size: int = 64,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    latent_dtype: Literal["float32", "float16"] = "float32",
    prefix: str = "lara",
    link: bool = True,
    revision: str | None = None,
    dataset_revision: str | None = None,
    json: bool = False,
) -> int:
    """Write the latent action of every frame of a LeRobot-format dataset: as features of a copy, or as a parquet sidecar.

    Kill it anywhere and run it again: it goes on. Exit status: 0; 2 if something is wrong with the arguments, the dataset
    or the model.

    Args:
        dataset: folder or Hub id of a dataset of LeRobot's format 2.0, 2.1 or 3.0; it is never changed.
        lam: folder or Hub id of a latent action model.
        output: folder of the copy; with --sidecar a file that ends in .parquet.
        gap: distance between the two frames, in frames ("16") or seconds ("0.5s"), as the model was trained.
        camera: key of the camera; not needed where there is one.
        sidecar: write only a parquet file with the labels, no copy of the dataset.
        batch_size: frames encoded at once.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: precision the model runs in.
        latent_dtype: precision of the stored latent.
        prefix: the features are PREFIX.indices, PREFIX.latent and PREFIX.valid.
        link: hard-link videos where the file system can, instead of copying them.
        revision: commit, tag or branch of the model on the Hub.
        dataset_revision: commit, tag or branch of the dataset on the Hub.
        json: print JSON instead of text.
    """
    from ..lam.label.run import label_dataset

    report = label_dataset(
        dataset,
        lam,
        output,
        gap=gap,
        camera=camera,
        sidecar=sidecar,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        latent_dtype=latent_dtype,
        prefix=prefix,
        link=link,
        revision=revision,
        dataset_revision=dataset_revision,
    )
    if json:
        write(to_json(report._asdict()))
        return 0
    wanted = "indices, latent, valid" if sidecar else ", ".join(report.features)
    write(
        f"{report.output}: {wanted} of {report.frames} frames in {report.episodes} episodes"
        + (f", {report.resumed} of them labelled before" if report.resumed else "")
        + f"\n{report.invalid} frames without a future within the episode (valid is False); {report.codes_used} codes used"
    )
    return 0


def health(
    lam: str,
    data: str,
    /,
    *,
    gap: str | None = None,
    gaps: tuple[str, ...] = (),
    camera: str | None = None,
    pairs: int = 256,
    batch_size: int = 32,
    device: str = "auto",
    revision: str | None = None,
    json: bool = False,
) -> int:
    """Is this latent action model any good on this data? Reconstruction, codes, collapse, frame gap, probe; and advice.

    Exit status: 0 healthy; 1 a threshold failed; 2 it cannot be told.

    Args:
        lam: folder or Hub id of a latent action model.
        data: dataset of LeRobot's format (folder or Hub id), folder of videos, or one video.
        gap: frame gap to judge, in frames ("16") or seconds ("0.5s"); without it the best of --gaps.
        gaps: frame gaps to measure; without it some around --gap, or 1 2 4 8 16 32.
        camera: key of the camera; not needed where there is one.
        pairs: about how many pairs of frames per gap.
        batch_size: pairs at once.
        device: auto, cpu, cuda, cuda:1, ...
        revision: commit, tag or branch of the model on the Hub.
        json: print JSON instead of text.
    """
    from ..lam.health.report import examine

    report = examine(
        lam,
        data,
        gap=gap,
        gaps=gaps,
        camera=camera,
        pairs=pairs,
        batch_size=batch_size,
        device=device,
        revision=revision,
    )
    write(to_json(report.to_dict()) if json else str(report))
    return 0 if report.ok else 1


def attention(
    lam: str,
    data: str,
    /,
    *,
    output: str,
    gap: str,
    compare: str | None = None,
    frames: tuple[str, ...] = (),
    pairs: int = 6,
    layer: int = -1,
    queries: bool = False,
    camera: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    json: bool = False,
) -> int:
    """What a latent action model looks at: attention.png and attention.npz in a folder, and a few numbers.

    Exit status: 0; 2 if something is wrong with the arguments, the data or a model.

    Args:
        lam: folder or Hub id of a latent action model.
        data: dataset of LeRobot's format (folder or Hub id), folder of videos, or one video.
        output: folder for attention.png and attention.npz.
        gap: distance between the two frames, in frames ("16") or seconds ("0.5s"), as the model was trained.
        compare: another model on the same frames, for instance the LARA-LAM beside the LAM.
        frames: which pairs, as CLIP:FRAME (3:40) or FRAME; without it --pairs of them, spread evenly.
        pairs: how many pairs without --frames.
        layer: of the M-Former, from 0, or from the last as -1.
        queries: one picture per query instead of their mean.
        camera: key of the camera; not needed where there is one.
        device: auto, cpu, cuda, cuda:1, ...
        revision: commit, tag or branch of the model on the Hub.
        json: print JSON instead of text.
    """
    from ..lam.attention.picture import draw
    from ..lam.attention.report import look, save_arrays

    report = look(
        lam,
        data,
        gap=gap,
        compare=compare,
        frames=frames,
        pairs=pairs,
        layer=layer,
        camera=camera,
        device=device,
        revision=revision,
    )
    folder = Path(output)
    if folder.is_file():
        raise LaraArgumentError(f"output={output!r} is a file, but a folder is expected")
    draw(report, folder / "attention.png", queries=queries)
    save_arrays(report, folder / "attention.npz")
    numbers = report.numbers()
    if json:
        write(to_json({"output": output, "pairs": len(report.pairs), "gap": report.gap, "models": numbers}))
        return 0
    lines = [f"{output}: attention.png and attention.npz of {len(report.pairs)} pairs {report.gap} frames apart"]
    width = max(len(entry["model"]) for entry in numbers)
    lines.append(f"{'model':<{width}}  on motion  on the present frame  entropy / even")
    for entry in numbers:
        motion = "none" if entry["on_motion"] is None else f"x {entry['on_motion']:.2f}"
        lines.append(f"{entry['model']:<{width}}  {motion:>9}  {entry['present']:>20.0%}  {entry['entropy']:>14.2f}")
    write("\n".join(lines))
    return 0
