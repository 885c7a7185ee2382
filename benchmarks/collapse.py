"""What a healthy and a collapsing run look like in the log, on the quickstart's world.

    python -m benchmarks.collapse            # two runs, about four minutes on two CPU cores; results/collapse.json, .png
    python -m benchmarks.collapse --draw     # the picture from the record
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara
from lara_adapter.storage.files import read_json, write_json

RECORD = RESULTS / "collapse.json"
PICTURE = RECORD.with_suffix(".png")
RUNS = {
    "healthy: alignment='contrastive'": {"alignment": "contrastive"},
    "collapsing: alignment='cosine'": {"alignment": "cosine", "lam_weight": 0.01},
}
SHOWN = {
    "align_loss": "alignment loss",
    "mean_direction": "mean direction",
    "perplexity": "perplexity of the codes",
    "lam_loss": "LAM loss",
}
STEPS, EVERY = 400, 10


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train the quickstart's LAM, then its policy with LARA; the log of the second."""
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)
    lam = LatentActionModel(LatentActionConfig.tiny(image_size=quickstart.SIZE, vq_warmup_steps=75))
    optimizer = torch.optim.AdamW(lam.parameters(), lr=1e-3)
    for _ in range(300):
        loss = lam(*quickstart.make_batch(data)["lara_frames"].unbind(1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy = quickstart.new_policy()
    lara = attach_lara(policy, lam, layer=-3, **{"align_weight": 0.1, "lam_weight": 0.1} | settings)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    warnings = Warnings()
    logging.getLogger("lara_adapter").addHandler(warnings)
    log: dict[str, list[float]] = {name: [] for name in ("step", *SHOWN)}
    for step in range(1, STEPS + 1):
        loss = policy(quickstart.make_batch(data))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            shown = lara.metrics()
            for name in SHOWN:
                log[name].append(round(shown[name], 4))
            log["step"].append(step)
    logging.getLogger("lara_adapter").removeHandler(warnings)
    return {"settings": settings, "log": log, "warnings": warnings.texts}


class Warnings(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(record.getMessage())


def draw() -> None:
    """Draw the record: a column for each run, the same scale in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = read_json(RECORD)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(len(SHOWN), len(runs), sharex=True, sharey="row", squeeze=False)
    for column, (name, found) in enumerate(runs.items()):
        colour = ("#1b7837", "#b2182b")[column]
        axes[0][column].set_title(name, fontsize=11)
        for row, (key, label) in enumerate(SHOWN.items()):
            axes[row][column].plot(found["log"]["step"], found["log"][key], color=colour)
            axes[row][column].grid(alpha=0.3)
            axes[row][0].set_ylabel(label)
        axes[-1][column].set_xlabel("step")
    FigureCanvasAgg(figure).print_png(PICTURE)


def main() -> None:
    """Run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only the picture")
    if not parser.parse_args().draw:
        write_json(RECORD, {name: run(settings) for name, settings in RUNS.items()})
    draw()


if __name__ == "__main__":
    main()
