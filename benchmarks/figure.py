"""Draw the figure of what LARA attaches to: `python -m benchmarks.figure` -> benchmarks/results/lara.png."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks import RESULTS

TARGET = RESULTS / "lara.png"
HOST, OURS, LAM, LOSS = "#dfe6ee", "#f6c56f", "#bfe0c2", "#f3b0a8"


def box(axis, x, y, w, h, text, color, size=9.5):
    """A rounded box with centred text."""
    axis.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.06", fc=color, ec="#444", lw=0.9)
    )
    axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size)


def arrow(axis, start, end, style="-", color="#333", bend=0.0):
    """An arrow between two points."""
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, lw=1.2, ls=style, color=color,
            connectionstyle=f"arc3,rad={bend}", shrinkA=1, shrinkB=1,
        )
    )  # fmt: skip


def main() -> None:
    """Draw and save."""
    figure, axis = plt.subplots(figsize=(10.4, 4.5))
    axis.set_xlim(0, 10.4)
    axis.set_ylim(0, 4.5)
    axis.axis("off")
    # the policy, above
    axis.text(0.1, 4.28, "your policy, untouched", fontsize=10.5, weight="bold")
    box(axis, 0.1, 3.2, 1.55, 0.75, "image $I_t$, state,\nlanguage", HOST)
    box(axis, 2.1, 3.2, 1.25, 0.75, "VLM or\nencoder", HOST)
    for i, name in enumerate(("block 1", "...", "block L-2", "block L-1", "block L")):
        box(axis, 3.85 + 0.93 * i, 3.2, 0.84, 0.75, name, HOST, 8.5)
    box(axis, 8.85, 3.2, 1.4, 0.75, "action loss\n$L_{ACT}$", LOSS)
    arrow(axis, (1.65, 3.57), (2.1, 3.57))
    arrow(axis, (3.35, 3.57), (3.85, 3.57))
    arrow(axis, (8.43, 3.57), (8.85, 3.57))
    axis.text(
        6.0, 4.1, "diffusion transformer on [state | noisy action chunk]", fontsize=8.5, ha="center", color="#333"
    )
    # what is attached, below
    axis.text(0.1, 2.42, "attached by attach_lara, gone after detach", fontsize=10.5, weight="bold")
    box(axis, 0.1, 0.9, 1.55, 0.95, "frames\n$I_t$ , $I_{t+C}$", LAM)
    box(axis, 2.1, 0.9, 1.45, 0.95, "inverse\ndynamics\n(M-Former)", LAM)
    box(axis, 4.0, 0.9, 0.95, 0.95, "latent\naction\n$z_t$", LAM)
    box(axis, 4.0, 0.05, 0.95, 0.5, "codes (VQ)", LAM, 8.5)
    box(axis, 5.4, 0.05, 1.45, 0.5, "forward dynamics", LAM, 8.5)
    box(axis, 7.25, 0.05, 1.3, 0.5, r"$\hat I_{t+C}$:  $L_{LAM}$", LOSS)
    box(axis, 5.55, 2.0, 1.3, 0.62, "projector $f_\\psi$", OURS)
    box(axis, 5.55, 0.98, 3.0, 0.75, "align: $1-\\cos(z_t,\\, f_\\psi(h_t))$\nor contrastive  =  $L_{LARA}$", LOSS)
    box(axis, 8.85, 1.95, 1.4, 0.62, "$L_{ACT}+w_1L_{LARA}$\n$+\\,w_2L_{LAM}$", LOSS, 8.5)
    arrow(axis, (1.65, 1.37), (2.1, 1.37))
    arrow(axis, (3.55, 1.37), (4.0, 1.37))
    arrow(axis, (4.95, 1.37), (5.55, 1.37))
    arrow(axis, (4.47, 0.9), (4.47, 0.55))
    arrow(axis, (4.95, 0.3), (5.4, 0.3))
    arrow(axis, (6.85, 0.3), (7.25, 0.3))
    arrow(axis, (6.15, 3.2), (6.15, 2.62), color="#b36b00")
    axis.text(6.25, 2.88, "hook: $h_t$, last valid action token", fontsize=8.5, color="#b36b00")
    arrow(axis, (6.2, 2.0), (6.2, 1.73), color="#b36b00")
    arrow(axis, (8.55, 1.5), (9.2, 1.95))
    arrow(axis, (8.55, 0.35), (9.75, 1.95), bend=0.25)
    arrow(axis, (9.55, 3.2), (9.55, 2.57))
    figure.savefig(TARGET, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
