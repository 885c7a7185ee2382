"""What lerobot_posttrain.py prints at its end."""

from __future__ import annotations

from typing import Any


def table(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    trained, acted = report["training"], report["closed_loop"]
    rows = [
        ("policy", f"{trained['policy']}, {trained['policy_parameters']:,} parameters, {report['arm']}"),
        ("data", f"{trained['dataset']['episodes']} episodes, {trained['dataset']['frames']} frames"),
        ("training", f"{trained['steps']} steps, {trained['seconds_per_step']:.2f} s each"),
        ("action loss", f"{trained['action_loss']:.4f} (mean of the last logged steps)"),
    ]
    last = trained["history"][-1]
    if "align_loss" in last:
        numbers = ("align_loss", "cosine", "mean_direction", "reconstruction_over_copy", "codes_used")
        rows.append(("LARA", ", ".join(f"{name} {last[name]:.3g}" for name in numbers)))
    for name, rate in {**acted["tasks"], "all": acted["all"]}.items() if acted else ():
        low, high = (100 * end for end in rate["interval_95"])
        rows.append((name, f"{rate['successes']}/{rate['episodes']} solved (95 % interval {low:.0f}-{high:.0f} %)"))
    if not acted:
        rows.append(("closed loop", "not run: the dataset is none of record_metaworld.py, or --episodes 0"))
    return "\n".join(f"{name:<14} {text}" for name, text in rows)
