"""What the recorded comparisons with the official releases say, for the documents; and whether they pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import markdown
from benchmarks.parity import official, openpi
from benchmarks.parity.differences import TOLERANCE, largest_relative, passes
from lara_adapter.storage.files import read_json

GR00T = read_json(official.RESULT)
OPENPI = read_json(openpi.RESULT)
LABELS = {
    "release, frames in [0, 1]": "as released, frames in [0, 1] (their LAM pre-training)",
    "release, frames ImageNet-normalised": "as released, frames ImageNet-normalised (their joint training)",
    "legacy=False on both sides": "`legacy=False` on both sides",
    "fusion concat, mask token": 'fusion "concat" with mask token ({} tensors)',
    "release, perceptual off": "perceptual term off",
    "release, LPIPS with its kinks": "LPIPS with its ReLUs and max poolings",
}


def differences(record: dict[str, Any], labels: dict[str, str]) -> str:
    """Largest relative difference of each case."""
    rows = []
    for name, label in labels.items():
        case = record["cases"][name]
        narrow = case["float32"]
        values = largest_relative(narrow, with_gradients=False)
        gradients = max(row["rel"] for groups in narrow["gradients"].values() for row in groups.values())
        largest = (values, gradients, case["float64"]["largest_rel"])
        rows.append((label.format(narrow["trainable_tensors"]), *(f"{value:.1e}" for value in largest)))
    head = ("case", "losses, latent, frame: float32", "gradients: float32", "everything: float64")
    return markdown.table(head, rows)


def gr00t_section() -> str:
    """Of the GR00T N1.5 release."""
    cases = GR00T["cases"]
    release, kinks = cases["release, frames in [0, 1]"]["float32"], cases["release, LPIPS with its kinks"]
    rounding, shuffled = kinks["lam_gradients_from_official_float64"], cases["release, switch OFF"]
    ours, theirs = shuffled["float32"], shuffled["official_against_itself"]

    def difference(result: dict[str, Any], value: str) -> str:
        return f"{result['values'][value]['rel']:.1e}"

    return "\n\n".join(
        (
            markdown.paragraph(
                f"""Largest relative difference over {GR00T["seeds"]} seeds, per tensor (max |ours - theirs| over
                max |theirs|); {sum(row["tensors"] for row in release["gradients"]["total"].values())} of
                {release["trainable_tensors"]} trainable tensors compared, none on one side only, no code of
                {release["codes"]} differs
                ([benchmarks/results/parity_official.json](../benchmarks/results/parity_official.json)):"""
            ),
            differences(GR00T, LABELS),
            markdown.paragraph(
                f"""The last row's float32 gradients are rounding: a ReLU of VGG that switches moves them; theirs in
                float32 are as far from theirs in float64 ({rounding["official"]:.1e}; ours {rounding["ours"]:.1e}).
                The other rows use the same LPIPS made smooth."""
            ),
            markdown.paragraph(
                f"""**The one switch.** transformers' `ViTMAEModel` shuffles the patches at random even at mask
                ratio 0, so the official latent of a fixed pair is random. The comparison gives their encoder
                `noise=arange`, the reading order that ours always has. Without it, on an untrained LAM, the latent
                differs by {difference(ours, "latent, continuous")}, L_LAM by {difference(ours, "lam")} and
                {ours["codes_that_differ"]} of {ours["codes"]} codes; two runs of theirs differ from each other as
                much ({difference(theirs, "latent, continuous")}, {difference(theirs, "lam")},
                {theirs["codes_that_differ"]} codes)."""
            ),
        )
    )


def openpi_section() -> str:
    """Of the release for openpi."""
    cases = OPENPI["cases"]
    pi05, pi0 = cases["pi0.5, release"]["float32"], cases["pi0, release"]["float32"]
    first = markdown.paragraph(
        f"""Largest relative difference over {OPENPI["seeds"]} seeds, per tensor, of every loss and of the gradients
        of all {pi05["trainable_tensors"]} (pi0: {pi0["trainable_tensors"]}) trainable tensors, of which the same
        {len(pi05["without_gradient"])} get none on either side; no code of {pi05["codes"]} differs:"""
    )
    return f"{first}\n\n{differences(OPENPI, {case.name: case.name for case in openpi.CASES if case.switch})}"


def openpi_switch() -> str:
    """Of what their random patch order does."""
    off = OPENPI["cases"]["pi0.5, release, switch OFF"]
    ours, theirs = (off[key]["values"]["latent, continuous"]["rel"] for key in ("float32", "official_against_itself"))
    return markdown.paragraph(
        f"""Their image encoder gets a fixed patch order, as in the parity with GR00T's release; without it the latent
        of a fixed pair differs from ours by {ours:.1e} and from itself by {theirs:.1e}. Sizes are tiny and weights
        random."""
    )


SECTIONS = {
    "docs/parity.md": {"parity": gr00t_section, "openpi parity": openpi_section},
    "docs/hosts/openpi.md": {"patch order": openpi_switch},
}


def problems() -> Iterator[str]:
    """Cases that do not pass, or that are not those of the benchmark."""
    for record, release in ((GR00T, official), (OPENPI, openpi)):
        name = release.RESULT.name
        if record["settings"] != release.SETTINGS or record["tolerance"] != TOLERANCE or record["seeds"] < 3:
            yield f"{name}: not the settings of the benchmark"
        if record["cases"].keys() != {case.name for case in release.CASES}:
            yield f"{name}: not the cases of the benchmark"
        for case_name, case in record["cases"].items():
            for dtype, tolerance in TOLERANCE.items() if case["switch"] else ():
                result, judged = case[dtype], dtype == "float64" or not case["kinks"]
                compared = sum(row["tensors"] for row in result["gradients"]["total"].values())
                complete = compared == result["trainable_tensors"] - len(result["without_gradient"])
                if not (passes(result, tolerance, judged) and complete and result["passes"]):
                    yield f"{name}: {case_name}, {dtype}: does not pass"
