"""The result of the loop: a table of successes, and pictures of the films."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.demo.tables import Rows, aligned, markdown_table
from lara_adapter.storage.files import read_json, replace_file

PICTURES = 8  # of each film


def write(file: Path, folders: Mapping[str, Path]) -> str:
    """Write the report, and beside it a picture with a row of each arm's first film.

    Args:
        file: the report, Markdown.
        folders: of `lara eval`, for each arm.

    Returns:
        The table, for a terminal.
    """
    reports = {arm: read_json(folder / "report.json") for arm, folder in folders.items()}
    rows = table(reports)
    strips = [strip for folder in folders.values() if (strip := film_strip(folder)) is not None]
    picture = file.with_suffix(".png")
    if strips:
        with replace_file(picture) as path:
            Image.fromarray(np.concatenate(strips)).save(path, format="PNG")
    arms = ", ".join(folders)
    text = f"""# LARA on LIBERO tasks, scripted demonstrations

{markdown_table(rows)}

Successes of episodes, from LIBERO's stored starts, and Wilson's 95 % interval. One seed: differences say little. Not
comparable with published rates, whose demonstrations are human.

""" + (f"The first film of each arm, from above: {arms}\n\n![films]({picture.name})\n" if strips else "")
    with replace_file(file) as path:
        path.write_text(text, encoding="utf-8")
    return aligned(rows)


def table(reports: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Successes by task and arm."""
    arms = list(reports)
    tasks = list(reports[arms[0]]["tasks"])
    rows = [["task", *arms]]
    for task in tasks:
        rows.append([task.replace("_", " "), *(_count(reports[arm]["tasks"][task]) for arm in arms)])
    rows.append(["all", *(_rate(reports[arm]["all"]) for arm in arms)])
    return rows


def film_strip(folder: Path) -> NDArray[np.uint8] | None:
    """Pictures of the first film in a folder of `lara eval`, side by side; None: it has none."""
    import av

    for film in sorted((folder / "videos").glob("*.mp4")):
        with av.open(str(film)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        places = np.linspace(0, len(frames) - 1, PICTURES).round().astype(int)
        return np.concatenate([frames[place] for place in places], axis=1)
    return None


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['successes']} / {row['episodes']}"


def _rate(row: Mapping[str, Any]) -> str:
    low, high = row["interval_95"]
    return f"{_count(row)} ({low:.2f} to {high:.2f})"
