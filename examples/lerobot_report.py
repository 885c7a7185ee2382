"""The summary that lerobot_posttrain.py prints."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """Format the report as a few lines."""
    training, evaluation = report["training"], report["closed_loop"]
    rows = [
        ("policy", f"{training['policy']}, {training['policy_parameters']:,} parameters, {report['arm']}"),
        ("data", f"{training['dataset']['episodes']} episodes, {training['dataset']['frames']} frames"),
        ("training", f"{training['steps']} steps, {training['seconds_per_step']:.2f} s each"),
        ("action loss", f"{training['action_loss']:.4f} (mean of the last logged steps)"),
    ]
    last = training["history"][-1]
    if "align_loss" in last:
        numbers = ("align_loss", "cosine", "mean_direction", "reconstruction_over_copy", "codes_used")
        rows.append(("LARA", ", ".join(f"{name} {last[name]:.3g}" for name in numbers)))
    for name, rate in {**evaluation["tasks"], "all": evaluation["all"]}.items() if evaluation else ():
        low, high = (100 * end for end in rate["interval_95"])
        rows.append((name, f"{rate['successes']}/{rate['episodes']} solved (95 % interval {low:.0f}-{high:.0f} %)"))
    if not evaluation:
        rows.append(("closed loop", "not run: the dataset is not from record_metaworld.py, or --episodes 0"))
    return "\n".join(f"{name:<14} {text}" for name, text in rows)
