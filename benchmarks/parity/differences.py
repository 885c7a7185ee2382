"""What one run of a side gives, and how far two of them are apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
ZERO = 1e-12  # of the largest gradient of a loss: what is below that in float64 is zero apart from rounding


@dataclass
class Measured:
    """One side: scalars and tensors by name, codes, gradients by loss and official name, trainable tensors."""

    values: dict[str, Tensor]
    codes: Tensor
    gradients: dict[str, dict[str, Tensor]]
    trainable: set[str]


def gradients(losses: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """The gradient of each loss by parameter name; parameters that a loss does not reach are absent."""
    found = {}
    for name, loss in losses.items():
        result = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        found[name] = {key: grad for key, grad in zip(parameters, result) if grad is not None}
    return found


def difference(ours: Tensor, theirs: Tensor, scale: float | None = None) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest reference value (or over `scale`)."""
    absolute = float((ours.double() - theirs.double()).abs().max())
    largest = float(theirs.double().abs().max()) if scale is None else scale
    return absolute, absolute / largest if largest > 0 else (0.0 if absolute == 0 else math.inf)


def zeros(measured: Measured) -> dict[str, set[str]]:
    """By loss, the tensors whose gradient in float64 is zero apart from rounding."""
    result = {}
    for loss, grads in measured.gradients.items():
        largest = max(float(grad.abs().max()) for grad in grads.values())
        result[loss] = {name for name, grad in grads.items() if float(grad.abs().max()) <= ZERO * largest}
    return result


def distance(found: dict[str, Tensor], exact: dict[str, Tensor], rounding: set[str]) -> float:
    """Largest relative difference of gradients from the reference's in float64, those that are zero left out."""
    return max(difference(grad, exact[name])[1] for name, grad in found.items() if name not in rounding)


def compare(
    theirs: Measured, ours: Measured, rounding: dict[str, set[str]], group: Callable[[str], str]
) -> dict[str, Any]:
    """Every difference of one run.

    Args:
        theirs: the reference.
        ours: what is compared with it.
        rounding: by loss, gradients to be held against the largest of the loss; from :func:`zeros`.
        group: the row of the table that a tensor belongs to, by its name.
    """
    rows = {}
    for name, reference in theirs.values.items():
        absolute, relative = difference(ours.values[name].view_as(reference), reference)
        rows[name] = {"abs": absolute, "rel": relative}
        if reference.ndim == 0:
            rows[name] |= {"official": float(reference), "ours": float(ours.values[name])}
    grads: dict[str, Any] = {}
    left_out = {"trainable": sorted(theirs.trainable ^ ours.trainable)}
    for loss, reference in theirs.gradients.items():
        found = ours.gradients[loss]
        left_out[loss] = sorted(reference.keys() ^ found.keys())
        largest = max(float(grad.abs().max()) for grad in reference.values())
        groups: dict[str, Any] = {}
        for name in sorted(reference.keys() & found.keys()):
            row = groups.setdefault(
                group(name), {"tensors": 0, "zero": 0, "abs": 0.0, "rel": 0.0, "worst": "", "largest": 0.0}
            )
            zero = name in rounding[loss]
            absolute, relative = difference(found[name], reference[name], largest if zero else None)
            row["tensors"] += 1
            row["zero"] += zero
            row["abs"] = max(row["abs"], absolute)
            row["largest"] = max(row["largest"], float(reference[name].abs().max()))
            if relative >= row["rel"]:
                row["rel"], row["worst"] = relative, name
        grads[loss] = groups
    return {
        "values": rows,
        "gradients": grads,
        "left_out": left_out,
        "trainable_tensors": len(theirs.trainable),
        "without_gradient": sorted(theirs.trainable - theirs.gradients["total"].keys()),
        "codes_that_differ": int((theirs.codes != ours.codes).sum()),
        "codes": theirs.codes.numel(),
        "codes_used": len(theirs.codes.unique()),
    }


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of several seeds; values and counts are those of the first."""
    worst: dict[str, Any] = json.loads(json.dumps(results[0]))
    for other in results[1:]:
        pairs = [(worst["values"][name], row) for name, row in other["values"].items()]
        pairs += [
            (worst["gradients"][loss][group], row)
            for loss, groups in other["gradients"].items()
            for group, row in groups.items()
        ]
        for row, new in pairs:
            row["abs"] = max(row["abs"], new["abs"])
            if new["rel"] > row["rel"]:
                row["rel"] = new["rel"]
                if "worst" in row:
                    row["worst"] = new["worst"]
        for loss, names in other["left_out"].items():
            worst["left_out"][loss] = sorted({*worst["left_out"][loss], *names})
        for key in ("codes", "codes_that_differ"):
            worst[key] += other[key]
    worst["largest_rel"] = largest_relative(worst)
    return worst


def largest_relative(result: dict[str, Any], with_gradients: bool = True) -> float:
    """The largest relative difference of a result, over values and optionally gradients."""
    rows = list(result["values"].values())
    if with_gradients:
        rows += [row for groups in result["gradients"].values() for row in groups.values()]
    return float(max(row["rel"] for row in rows))


def passes(result: dict[str, Any], tolerance: float, judge_gradients: bool = True) -> bool:
    """Whether nothing differs by more than the tolerance, nothing is left out and the codes are the same."""
    return (
        largest_relative(result, judge_gradients) <= tolerance
        and not any(result["left_out"].values())
        and result["codes_that_differ"] == 0
    )


def table(report: dict[str, Any]) -> str:
    """The report as text: the largest relative differences of each case, and whether it passes."""
    lines = [f"largest relative difference of {report['seeds']} seeds; settings of both sides:"]
    lines += [f"  {name}: {text}" for name, text in report["settings"].items()]
    for name, case in report["cases"].items():
        lines += ["", f"== {name}"]
        if not case["switch"]:
            lines.append("the random patch order alone (untrained LAM, float32):")
            for title, key in (("ours against theirs", "float32"), ("theirs again", "official_against_itself")):
                values = ", ".join(f"{value} {row['rel']:.1e}" for value, row in case[key]["values"].items())
                lines.append(
                    f"  {title}: {values}; {case[key]['codes_that_differ']} of {case[key]['codes']} codes differ"
                )
            continue
        for dtype, tolerance in report["tolerance"].items():
            result = case[dtype]
            lines.append(f"{dtype} (tolerance {tolerance:.0e}): {'equal' if result['passes'] else 'DIFFERENT'}")
            lines += [f"  {value:30} {row['rel']:8.1e}" for value, row in result["values"].items()]
            for loss, groups in result["gradients"].items():
                worst = ", ".join(f"{group} {row['rel']:.1e}" for group, row in groups.items())
                lines.append(f"  gradient of {loss}: {worst}")
            alone = sorted({name for names in result["left_out"].values() for name in names})
            lines.append(
                f"  on one side only: {', '.join(alone) or 'none'}; codes that differ: {result['codes_that_differ']}"
            )
        rounding = case["lam_gradients_from_official_float64"]
        lines.append(
            f"gradients of lam in float32 against theirs in float64: theirs {rounding['official']:.1e}, "
            f"ours {rounding['ours']:.1e}"
        )
    return "\n".join(lines)
