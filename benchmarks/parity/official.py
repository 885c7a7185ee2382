"""Parity with the official release: their GR00T N1.5 with LARA against the same policy with `attach_lara`.

    pip install "transformers==4.51.3" "diffusers==0.35.1" torchvision accelerate lpips
    pip install hydra-core omegaconf einops dm-tree
    git clone https://github.com/lmy1001/LARA
    python -m benchmarks.parity.official --official LARA/LARA_full      # or LARA_OFFICIAL_SRC=LARA/LARA_full

The official code is imported and never changed. Both sides get the same weights, seeds (so the same flow noise, times
and dropout), frames and perceptual network; ours gets the tokenizer's weights through `lara_adapter.convert`.
Compared: L_ACT, the alignment loss, L_LAM and its terms, the total (summed by the official trainer's own
`compute_loss`), the latent, its codes, and every gradient by name, of each loss on its own and of the total.

ONE SWITCH is needed on their side: transformers' ViTMAEModel shuffles the patches at random even at mask_ratio 0,
unless it is given `noise`. The reference gets rising noise: the order that ours always has. A last run leaves the
switch off, for the record. What else differs by default is set alike and printed as settings. Stand-ins, the same on
both sides: tiny sizes and random weights, a linear layer in place of the Eagle VLM, and LPIPS with its own linear
weights over a VGG16 of random weights, its ReLUs and max poolings made smooth. Where they are kept, a rounding error of
1e-7 in the predicted frame switches a few, and gradients move by more than the tolerance (theirs in float32 against
theirs in float64 just as well, which is printed): that is a case of its own, whose gradients are judged in float64.

Differences: max |ours - theirs| over max |theirs|, per tensor. A gradient that is zero apart from rounding (the key biases
of attention: softmax does not see them) is held against the largest gradient of that loss instead; which ones those
are is taken from the float64 run. Exit status: 0, 1 if a relative difference in float32 exceeds 1e-5 (in float64
1e-10), a code differs or a tensor is left out on one side, 2 if the official code is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import math
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.checkout import Missing
from benchmarks.parity.differences import (
    TOLERANCE,
    Measured,
    compare,
    distance,
    gradients,
    merge,
    passes,
    table,
    zeros,
)
from benchmarks.parity.sides import (
    BATCH,
    SOURCES,
    Case,
    NormalizedFrames,
    add_tokenizer,
    converted,
    import_official,
    keep_float64,
    lam_config,
    make_batch,
    normalize,
    official_policy,
    randomize,
    set_patch_order,
)
from lara_adapter import FramePair, LatentActionConfig, __version__, attach_lara
from lara_adapter.convert import state_to_official
from lara_adapter.storage.files import write_json

RESULT = RESULTS / "parity_official.json"
CASES = (
    Case("release, frames in [0, 1]"),
    Case("release, frames ImageNet-normalised", normalized=True),
    Case("legacy=False on both sides", changes={"legacy_token_types": False, "legacy_commitment": False}),
    Case("fusion concat, mask token", changes={"fusion": "concat", "mask_token": True}),
    Case("release, perceptual off", changes={"perceptual_weight": 0.0}),
    Case("release, LPIPS with its kinks", kinks=True),
    Case("release, switch OFF", switch=False),
)
SETTINGS = {
    "attach_lara": 'layer=-3, token="last", projector="linear", alignment="cosine", align_weight=0.01, lam_weight=0.01',
    "legacy_token_types": "True: the release gives both frames token type 0 (and False against their legacy=False)",
    "legacy_commitment": "True: the release weighs the codebook term with beta (and False against their legacy=False)",
    "image_mean, image_std": "0 and 1: the official tokenizer normalises nothing itself; its joint training feeds "
    "ImageNet-normalised frames, compared here by normalising in front of both LAMs",
    "frames": "one pair, one view, all valid: the release has no valid flags",
    "patch order": "theirs: noise=arange to ViTMAEModel (the one switch); ours always has the reading order",
}


def run_official(
    official: types.SimpleNamespace,
    policy: Any,
    batch: dict[str, Tensor],
    case: Case,
    seed: int,
    order: int | None = None,
) -> Measured:
    """One training forward of the official model and trainer, and the gradients.

    Args:
        official: the modules.
        policy: their policy.
        batch: from :func:`make_batch`.
        case: whether frames are normalised, and the switch is on.
        seed: of flow noise, times and dropout.
        order: seed of the patch order, where the switch is off; None: it follows from `seed`.
    """
    tokenizer = policy.action_head.latent_motion_tokenizer
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, module in (
            ("lam", tokenizer), ("quantizer", tokenizer.vector_quantizer), ("decoder", tokenizer.decoder),
            ("perceptual", tokenizer.loss_fn_lpips),
        )
    ]  # fmt: skip
    if case.switch:
        handles.append(set_patch_order(tokenizer.image_encoder))
    if order is not None:  # the tokenizer draws last: flow noise and dropout do not change
        handles.append(tokenizer.register_forward_pre_hook(lambda m, a: (torch.manual_seed(order), None)[1]))
    inputs = {key: value for key, value in batch.items() if key != "frames"}
    frames = normalize(batch["frames"]) if case.normalized else batch["frames"]
    inputs["images"] = frames[:, None]
    # the trainer's own sum of the three losses, without a trainer around it
    host = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(unwrap_model=lambda model: model),
        args=types.SimpleNamespace(logging_steps=2),
        state=types.SimpleNamespace(global_step=1),
    )
    torch.manual_seed(seed)
    total, output = official.trainer.DualBrainTrainer.compute_loss(host, policy, inputs, return_outputs=True)
    for handle in handles:
        handle.remove()
    losses = {
        "action": output["loss"],
        "align": output["latent_loss"],
        "lam": output["tokenizer_vae_loss"],
        "total": total,
    }
    values = {
        "lam: reconstruction": F.mse_loss(seen["decoder"], frames[:, 1]),
        "lam: codebook and commitment": seen["quantizer"][2],
        "lam: perceptual": seen["perceptual"].mean() if "perceptual" in seen else torch.zeros_like(total),
        "predicted frame": seen["decoder"],
    }
    return their_measured(policy, losses, values, seen["lam"])


def their_measured(policy: Any, losses: dict[str, Tensor], values: dict[str, Tensor], found: Any) -> Measured:
    """The result of the official side; `found` is the output of its tokenizer."""
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    values = {**losses, **values, "latent, continuous": found.embed, "latent, quantized": found.quant}
    return Measured(
        {name: value.detach() for name, value in values.items()},
        found.indices.view(BATCH, -1),
        gradients(losses, parameters),
        set(parameters),
    )


def run_ours(policy: Any, lara: Any, batch: dict[str, Tensor], config: LatentActionConfig, seed: int) -> Measured:
    """One training forward of the policy with LARA attached, and the gradients under official names."""
    seen: dict[str, Any] = {}
    handles = [
        policy.action_head.register_forward_hook(lambda m, a, out: seen.update(action=out["loss"])),
        lara.lam.register_forward_hook(lambda m, a, out: seen.update(lam=out)),
    ]
    torch.manual_seed(seed)
    output = policy(dict(batch))
    for handle in handles:
        handle.remove()
    losses = {"action": seen["action"], "align": lara.losses.align, "lam": lara.losses.lam, "total": output["loss"]}
    template = getattr(lara.lam, "inner", lara.lam).state_dict()
    return our_measured(policy, losses, seen["lam"], config, lambda found: official_names(found, template, config))


def our_measured(
    policy: Any,
    losses: dict[str, Tensor],
    found: Any,
    config: LatentActionConfig,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Measured:
    """The result of our side, under official names.

    Args:
        policy: with LARA attached.
        losses: by name.
        found: the output of the LAM.
        config: the LAM's.
        rename: our names of tensors to the official ones.
    """
    terms = (found.codebook_loss, found.commitment_loss)
    first, second = terms[::-1] if config.legacy_commitment else terms
    values = {
        **losses,
        "lam: reconstruction": found.reconstruction_loss,
        "lam: codebook and commitment": first + config.commitment_weight * second,
        "lam: perceptual": found.perceptual_loss,
        "latent, continuous": found.latent.continuous,
        "latent, quantized": found.latent.quantized,
        "predicted frame": found.reconstruction,
    }
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return Measured(
        {name: value.detach() for name, value in values.items()},
        found.latent.indices,
        {loss: rename(grads) for loss, grads in gradients(losses, parameters).items()},
        set(rename({name: p.detach() for name, p in parameters.items()})),
    )


def official_names(
    found: dict[str, Tensor], template: dict[str, Tensor], config: LatentActionConfig
) -> dict[str, Tensor]:
    """Our gradients under the official names: those of projector and LAM mapped.

    Args:
        found: our name to gradient.
        template: the LAM's state, for names and shapes.
        config: the LAM's.
    """
    result, lam = {}, {}
    for name, grad in found.items():
        if name.startswith("lara.projector."):
            result[f"action_head.pred_latent_motion_head.{name.removeprefix('lara.projector.')}"] = grad
        elif name.startswith("lara.lam."):
            lam[name.removeprefix("lara.lam.").removeprefix("inner.")] = grad
        else:
            result[name] = grad
    # The map only renames, splits and reshapes, so it maps gradients too; NaN stands for "not reached".
    unknown = lam.keys() - template.keys()
    if unknown:
        raise AssertionError(f"gradients of no tensor of the LAM: {sorted(unknown)}")
    trained = {name: lam.get(name, torch.full_like(tensor, math.nan))
               for name, tensor in template.items() if name.partition(".")[0] != "quantizer"}  # fmt: skip
    trained["quantizer.weight"] = lam.get("quantizer.weight", torch.full_like(template["quantizer.weight"], math.nan))
    books = {name: tensor for name, tensor in template.items() if name not in trained}
    books["quantizer.offset"] = torch.zeros_like(books["quantizer.offset"])
    for name, grad in state_to_official({**trained, **books}, config).items():
        if not grad.isnan().all():
            result[f"action_head.latent_motion_tokenizer.{name}"] = grad
    return result


def measure(
    official: types.SimpleNamespace, case: Case, seed: int, dtype: torch.dtype
) -> tuple[Measured, Measured, Measured | None]:
    """Build both sides from the same weights and run them.

    Returns:
        Theirs, ours, and without the switch theirs once more, with another draw of the patch order.
    """
    config = lam_config(case)
    torch.manual_seed(seed)
    theirs: Any = official_policy(official, with_lara=True)
    randomize(theirs, seed)
    add_tokenizer(official, theirs, config, seed, case.kinks)
    theirs.to(dtype).train()

    ours: Any = official_policy(official, with_lara=False)
    own = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    ours.to(dtype).load_state_dict(own, strict=True)
    lam = converted(theirs.action_head.latent_motion_tokenizer, config, dtype)
    lara = attach_lara(
        ours.train(), NormalizedFrames(lam) if case.normalized else lam, layer=-3,
        blocks="action_head.model.transformer_blocks", token="last", projector="linear", alignment="cosine",
        align_weight=0.01, lam_weight=0.01, frames=lambda b: FramePair.from_tensor(b["frames"]),
    )  # fmt: skip
    lara.projector.to(dtype).load_state_dict(theirs.action_head.pred_latent_motion_head.state_dict())
    if dtype == torch.float64:
        lara.to(dtype)

    batch = make_batch(seed, dtype)
    with keep_float64() if dtype == torch.float64 else contextlib.nullcontext():
        reference = run_official(official, theirs, batch, case, seed)
        result = run_ours(ours, lara, batch, config, seed)
        again = None if case.switch else run_official(official, theirs, batch, case, seed, order=seed + 1000)
    return reference, result, again


def tensor_group(name: str) -> str:
    """The row of the table that a tensor belongs to."""
    for prefix, group in (
        ("backbone.", "VLM stand-in"),
        ("action_head.model.transformer_blocks.", "DiT blocks"),
        ("action_head.pred_latent_motion_head.", "projector"),
        ("action_head.latent_motion_tokenizer.m_former.", "LAM: M-Former"),
        ("action_head.latent_motion_tokenizer.vector_quantizer.", "LAM: codebook"),
        ("action_head.latent_motion_tokenizer.vq_", "LAM: resamplers"),
        ("action_head.latent_motion_tokenizer.decoder.", "LAM: decoder"),
    ):
        if name.startswith(prefix):
            return group
    return "rest of the head"


def run(
    source: Path,
    seeds: int = 3,
    chosen: Sequence[Any] = CASES,
    *,
    load: Callable[[Path], Any] = import_official,
    measuring: Callable[..., tuple[Measured, Measured, Measured | None]] = measure,
    group: Callable[[str], str] = tensor_group,
    settings: dict[str, str] = SETTINGS,
) -> dict[str, Any]:
    """Run the comparisons.

    Args:
        source: checkout of LARA_full.
        seeds: how many draws of weights, batches and noise.
        chosen: which cases.
        load: gives the official modules; this and the next three are those of openpi.py for the other release.
        measuring: runs both sides of a case.
        group: see :func:`compare`.
        settings: what is set alike on both sides, for the report.

    Returns:
        What is written to the results file, without the environment.

    Raises:
        Missing: the official code is not there.
    """
    official = load(source)
    cases = {}
    for case in chosen:
        by_dtype: dict[str, list[dict[str, Any]]] = {"float64": [], "float32": []}
        again: list[dict[str, Any]] = []
        inexact = {"official": 0.0, "ours": 0.0}
        for seed in range(seeds):
            rounding: dict[str, set[str]] = {}
            exact: dict[str, Tensor] = {}
            for dtype, results in by_dtype.items():
                theirs, ours, other = measuring(official, case, seed, getattr(torch, dtype))
                if dtype == "float64":
                    rounding, exact = zeros(theirs), theirs.gradients["lam"]
                else:
                    for side, found in (("official", theirs), ("ours", ours)):
                        inexact[side] = max(inexact[side], distance(found.gradients["lam"], exact, rounding["lam"]))
                results.append(compare(theirs, ours, rounding, group))
                if other is not None and dtype == "float32":
                    again.append(compare(theirs, other, rounding, group))
                gc.collect()  # modules and their hooks refer to each other, and each run has a VGG16 of its own
        entry: dict[str, Any] = {"switch": case.switch, "kinks": case.kinks}
        for dtype, results in by_dtype.items():
            entry[dtype] = merge(results)
            if case.switch:
                entry["lam_gradients_from_official_float64"] = inexact
                judge_gradients = dtype == "float64" or not case.kinks
                entry[dtype]["passes"] = passes(entry[dtype], TOLERANCE[dtype], judge_gradients)
        if again:
            entry["official_against_itself"] = merge(again)
        cases[case.name] = entry
    return {
        "tolerance": TOLERANCE,
        "seeds": seeds,
        "settings": settings,
        "cases": cases,
        "passes": all(entry[dtype]["passes"] for entry in cases.values() if entry["switch"] for dtype in TOLERANCE),
    }


def environment(
    source: Path,
    commit: str | None,
    sources: Sequence[str] = SOURCES,
    packages: Sequence[str] = ("torch", "transformers", "diffusers", "lpips", "numpy"),
) -> dict[str, Any]:
    """Versions, and which official code it was."""
    if commit is None:
        answer = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = answer.stdout.strip() or None
    digest = hashlib.sha256(b"".join((source / name).read_bytes() for name in sources)).hexdigest()
    return {
        "official": {"repository": "lmy1001/LARA", "folder": source.name, "commit": commit, "sha256": digest,
                     "sha256_of": list(sources)},
        "lara_adapter": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{name: version(name) for name in packages},
    }  # fmt: skip


def command(
    arguments: list[str] | None,
    release: str,
    variable: str,
    result: Path,
    compared: Callable[[Path, int], dict[str, Any]],
    described: Callable[[Path, str | None], dict[str, Any]],
) -> int:
    """Compare, print, write: the command line of a release's benchmark.

    Args:
        arguments: those of the command; None: of the process.
        release: its folder in the authors' repository.
        variable: environment variable that names a checkout of it.
        result: where the record goes by default.
        compared: (checkout, seeds) -> the report.
        described: (checkout, its commit or None) -> the environment.

    Returns:
        The exit status: 0 equal, 1 different, 2 without the official code.
    """
    parser = argparse.ArgumentParser(description=f"Parity with the official release ({release})")
    parser.add_argument("--official", type=Path, default=os.environ.get(variable),
                        help=f"checkout of {release}; default: the environment variable {variable}")  # fmt: skip
    parser.add_argument("--commit", help="its commit, where the checkout is not a git work tree")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=result)
    options = parser.parse_args(arguments)
    if options.official is None:
        print(
            "the official code is missing: git clone https://github.com/lmy1001/LARA, then pass --official "
            f"LARA/{release} or set {variable}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    source = Path(options.official).expanduser().resolve()
    try:
        report = compared(source, options.seeds)
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    write_json(options.output, {**report, "environment": described(source, options.commit)})
    return 0 if report["passes"] else 1


def main(arguments: list[str] | None = None) -> int:
    """See :func:`command`."""
    return command(arguments, "LARA_full", "LARA_OFFICIAL_SRC", RESULT, run, environment)


if __name__ == "__main__":
    raise SystemExit(main())
