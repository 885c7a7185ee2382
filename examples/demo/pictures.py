"""Pictures of a demo run: curves, the probe, frames with their predictions, attention, and rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "dit_only": "#BBBBBB",
    "frozen_lam": "#0072B2",
    "lara_cosine": "#E69F00",
    "lara_contrastive": "#009E73",
    "before": "#999999",
    "control": "#CC79A7",
}
# widths and dashes that keep coinciding curves visible
LINES = {"dit_only": (5, "-"), "frozen_lam": (3.2, "-"), "lara_cosine": (1.8, "-"), "lara_contrastive": (1.5, "--")}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "figure.dpi": 130}

Histories = Mapping[str, Mapping[str, Sequence[float]]]


def _smooth(values: Sequence[float], window: int = 5) -> NDArray[np.float64]:
    """Centred moving average; the window shrinks at the ends."""
    half = window // 2
    return np.array([np.mean(values[max(0, place - half) : place + half + 1]) for place in range(len(values))])


def draw_curves(
    file: Path, pretraining: Mapping[str, Sequence[float]], histories: Histories, names: Mapping[str, str]
) -> None:
    """Draw the training curves: action loss, cosine, and the health of the latent action models.

    Args:
        file: where to save the picture.
        pretraining: curves of the LAM on video.
        histories: curves of each arm and of the control.
        names: label of each arm.
    """
    panels = [
        ("action_loss", "Policy: action loss $L_{ACT}$ (log scale)"),
        ("cosine", r"Alignment: cosine of $f_\psi(h_t)$ and $z_t$"),
        ("mean_direction", "LAM: mean direction $|E[z/|z|]|^2$ (1: collapsed)"),
        ("reconstruction_over_copy", "LAM: reconstruction error over copying $I_t$"),
    ]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
        for axis, (key, title) in zip(axes.flat, panels):
            for name, history in histories.items():
                if key in history:
                    width, dash = LINES.get(name, (1.5, "-"))
                    curve = _smooth(history[key])
                    axis.plot(history["step"], curve, dash, color=COLOURS[name], label=names[name], lw=width)
            axis.set(title=title, xlabel="training step")
            axis.set_ylim(None, None) if key == "action_loss" else axis.set_ylim(0, 1.03)
        axes[0, 0].set_yscale("log")
        axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        last = axes[1, 1]
        steps = np.asarray(pretraining["step"]) - pretraining["step"][-1]
        last.plot(
            steps,
            _smooth(pretraining["reconstruction_over_copy"]),
            color=COLOURS["before"],
            label="on video, before",
            lw=1.5,
        )
        last.axvline(0, color="black", lw=0.6)
        last.set(xlabel="training step (0: the demonstrations begin)", ylim=(0, 1.25))
        for axis in axes.flat:
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(file)
        plt.close(figure)


def draw_motion(file: Path, measured: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> None:
    """Draw the main result: how much of the hand's motion each model's latent holds, beside what can be seen at all.

    Args:
        file: where to save the picture.
        measured: of each latent action model, target -> fields of `lara_adapter.lam.health.motion.Motion`.
        names: label of each model.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.8, 2.6), constrained_layout=True)
        found = [(name, targets["displacement"]) for name, targets in measured.items()]
        for place, (name, values) in enumerate(found):
            beyond = values["beyond"]
            axis.barh(place, beyond["value"], color=COLOURS[name], height=0.62)
            axis.plot([beyond["low"], beyond["high"]], [place, place], color="black", lw=1.2)
            axis.text(max(beyond["high"], 0) + 0.01, place, f"{beyond['value']:.2f}", va="center")
        ends = [values["beyond"]["high"] for _, values in found]
        ceiling = found[0][1]["ceiling_beyond"]["value"]
        if ceiling > 0:  # from very few episodes nothing can be learnt, with labels either
            axis.axvline(ceiling, color="black", ls=":", lw=1)
            axis.text(ceiling, -0.62, "trained with labels ", fontsize=7, va="center", ha="right")
        axis.set(
            xlim=(min(0, *(max(-0.5, values["beyond"]["low"]) for _, values in found)), max(0.3, ceiling, *ends) + 0.1),
            ylim=(len(found) - 0.5, -0.85), xlabel="$R^2$ beyond the present frame, on held-out play",
        )  # fmt: skip
        axis.set(yticks=range(len(found)), yticklabels=[names[name] for name, _ in found])
        axis.set_title("How much of the hand's motion the latent holds", loc="left")
        figure.savefig(file)
        plt.close(figure)


def draw_probe(file: Path, measured: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> None:
    """Draw how much of the expert's action a linear probe reads from each model's latent.

    Args:
        file: where to save the picture.
        measured: of each latent action model, with `r2`, `r2_interval` and `r2_task_only`.
        names: label of each model.
    """
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.8, 2.6), constrained_layout=True)
        for place, (name, values) in enumerate(measured.items()):
            low, high = values["r2_interval"]
            axis.barh(place, values["r2"], color=COLOURS[name], height=0.62)
            axis.plot([low, high], [place, place], color="black", lw=1.2)
            axis.text(max(high, 0) + 0.015, place, f"{values['r2']:.2f}", va="center")
        floor = next(iter(measured.values()))["r2_task_only"]
        axis.axvline(floor, color="black", ls=":", lw=1)
        axis.text(floor + 0.008, -0.62, "knowing only the task", fontsize=7, va="center")
        lowest = min(0.0, *(values["r2_interval"][0] for values in measured.values()))
        axis.set(
            xlim=(max(lowest, -1), 1.08), ylim=(len(measured) - 0.5, -0.85), xlabel="$R^2$ on held-out demonstrations"
        )
        axis.set(yticks=range(len(measured)), yticklabels=[names[name] for name in measured])
        axis.set_title("How much of the expert's action the latent holds (linear probe; position counts)", loc="left")
        figure.savefig(file)
        plt.close(figure)


def _picture(frame: Tensor) -> NDArray[np.uint8]:
    """Turn [3, H, W], uint8 or float in [0, 1], into [H, W, 3] uint8."""
    if frame.dtype != torch.uint8:
        frame = (frame * 255).round().to(torch.uint8)
    return frame.permute(1, 2, 0).numpy()


def draw_predictions(file: Path, pictures: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]) -> None:
    """Draw frames, the frames 16 steps later, and each forward dynamics model's prediction from the latent action.

    Args:
        file: where to save the picture.
        pictures: of each latent action model, as `examine_lam` saves them; all of the same pairs.
        names: label of each model.
    """
    first = next(iter(pictures.values()))
    columns = [("$I_t$", first["now"]), ("$I_{t+C}$, the truth", first["future"])]
    columns += [(f"{names[name]}", kept["predicted"]) for name, kept in pictures.items()]
    with plt.rc_context(STYLE):
        rows = len(first["now"])
        figure, axes = plt.subplots(
            rows, len(columns), figsize=(1.75 * len(columns), 1.75 * rows + 0.5), layout="constrained", squeeze=False
        )
        for column, (title, frames) in enumerate(columns):
            axes[0, column].set_title(title, fontsize=9)
            for row in range(rows):
                axes[row, column].imshow(_picture(frames[row]), interpolation="nearest")
                axes[row, column].set_axis_off()
        figure.suptitle(r"Predictions of $I_{t+C}$ from $I_t$ and the quantised latent action", fontsize=10)
        figure.savefig(file)
        plt.close(figure)


def draw_attention(
    file: Path, pictures: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str], pairs: int = 3
) -> None:
    """Draw where the M-Former's queries look, in both frames (LARA, Fig. 5).

    Args:
        file: where to save the picture.
        pictures: of each latent action model, with `attention` [B, 2, h, w].
        names: label of each model.
        pairs: number of pairs of frames.
    """
    first = next(iter(pictures.values()))
    pairs = min(pairs, len(first["now"]))
    indices = torch.linspace(0, len(first["now"]) - 1, pairs).long().tolist()
    times = {name: kept["attention"][indices] * kept["attention"][0].numel() for name, kept in pictures.items()}
    # nothing is drawn below uniform attention; above it, the colour scale is logarithmic
    scale = LogNorm(1, max(4.0, *(float(part.max()) for part in times.values())))
    colours = plt.get_cmap("inferno")(np.linspace(0.25, 1, 256))
    colours[:, 3] = np.linspace(0, 0.85, 256)
    spotlight = ListedColormap(colours)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(pictures) + 1,
            2 * pairs,
            figsize=(1.6 * 2 * pairs + 1.4, 1.6 * (len(pictures) + 1) + 0.5),
            layout="constrained",
            squeeze=False,
        )
        for column in range(2 * pairs):
            pair, which = indices[column // 2], column % 2
            frame = _picture(first["future" if which else "now"][pair])
            axes[0, column].set_title("$I_{t+C}$" if which else "$I_t$")
            axes[0, column].imshow(frame, interpolation="nearest")
            grey = frame.mean(2)
            for row, name in enumerate(pictures, 1):
                height, width = frame.shape[:2]
                axes[row, column].imshow(grey, cmap="gray", interpolation="nearest", vmin=-60, vmax=400)
                heat = axes[row, column].imshow(
                    times[name][column // 2, which].clamp_min(1),
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                    cmap=spotlight,
                    norm=scale,
                    interpolation="bilinear",
                )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for row, name in enumerate(["the frames", *(names[key] for key in pictures)]):
            axes[row, 0].set_ylabel(name, fontsize=9)
        bar = figure.colorbar(heat, ax=axes[1:, :], shrink=0.6, pad=0.01)
        bar.set_label("attention, over evenly spread attention")
        bar.ax.set_facecolor("#595959")  # as in the panels, the colours are drawn over grey
        doublings = [2**power for power in range(8) if 2**power <= scale.vmax]
        bar.set_ticks(doublings, labels=[f"x {value}" for value in doublings])
        bar.minorticks_off()
        figure.savefig(file)
        plt.close(figure)


def write_rollout(file: Path, films: Sequence[Tensor], outcomes: Sequence[bool], title: str) -> None:
    """Write a GIF: episodes side by side, the title above, the outcome below.

    Args:
        file: the GIF.
        films: one [N, 3, H, W] uint8 for each episode; a shorter one keeps its last picture.
        outcomes: whether each solved its task.
        title: the line above.
    """
    side, bar = films[0].shape[-1], 18
    length, font = max(len(film) for film in films) + 8, ImageFont.load_default(size=12)
    pages = []
    for index in range(length):
        page = Image.new("RGB", (side * len(films), side + 2 * bar), "white")
        draw = ImageDraw.Draw(page)
        draw.text((4, 2), title, fill="black", font=font)
        for place, (film, solved) in enumerate(zip(films, outcomes)):
            page.paste(Image.fromarray(_picture(film[min(index, len(film) - 1)])), (place * side, bar))
            if index >= len(film) - 1:
                word, colour = ("solved", "#00734f") if solved else ("not solved in time", "#b02000")
                draw.text((place * side + 4, side + bar + 2), word, fill=colour, font=font)
        pages.append(page.quantize(128, dither=Image.Dither.NONE))
    pages[0].save(file, save_all=True, append_images=pages[1:], duration=120, loop=0, optimize=True)
