"""`attach_lara` and `load_lara`: what is refused, and what is put together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from ._version import __version__
from .adapter import LaraAdapter
from .binding import Binding
from .blocks import Blocks, blocks_name, same_blocks
from .config import DEFAULT_FRAMES, LaraConfig, row_to_json
from .entry import check_entry
from .errors import AdapterFormatError, AttachOrderError, LaraArgumentError
from .heads import doubt
from .losses import Alignment, resolve_alignment
from .policies import PolicySpec, find_spec, unwrapped
from .saving.read import read_adapter
from .schedules import Weight, check_share, check_weight, weight_to_json
from .storage.origins import origins_of, warn_of_others
from .tap import Tap, resolve_tap
from .terms import build_projector, trained_in_float32
from .tokens import TokenRule, check_rule

__all__ = ["attach_lara", "load_lara", "locate"]

logger = logging.getLogger(__name__)

_TO_RECONSTRUCT = {"draw", "reconstruct"}  # arguments of a LAM's forward
_WRAPPERS = {
    "DistributedDataParallel": "attach_lara first, then DDP(policy)",
    "DataParallel": "use torchrun or accelerate launch, one process per GPU, and attach_lara before wrapping",
    "FullyShardedDataParallel": "attach_lara first, then FSDP(policy)",
    "DeepSpeedEngine": "attach_lara first, then deepspeed.initialize",
    "OptimizedModule": "attach_lara first, then torch.compile(policy)",
}


def attach_lara(
    policy: nn.Module,
    lam: nn.Module | str | Path,
    layer: int | str = -3,
    *,
    blocks: Blocks | None = None,
    frames: str | Callable[[Any], Any] = DEFAULT_FRAMES,
    token: TokenRule = "last_valid",
    projector: str | nn.Module = "mlp",
    alignment: str | Alignment = "cosine",
    align_weight: Weight = 0.01,
    lam_weight: Weight = 0.01,
    lam_grad_scale: float = 1.0,
    reconstruct: float = 1.0,
    train_lam: bool = True,
    add_to_loss: bool = True,
    frames_optional: bool = False,
    entry: str | None = None,
    spec: PolicySpec | None = None,
) -> LaraAdapter:
    """Attach LARA to a policy, whose training forward then returns L_ACT + w1 L_LARA + w2 L_LAM (LARA, Eq. 7).

    Call it after `get_peft_model`, and before the optimizer, DDP, FSDP, DeepSpeed, `accelerate.prepare`, Trainer and
    torch.compile. In eval mode and under no_grad the policy runs as if nothing were attached.

    Args:
        policy: any module with a diffusion-transformer action head whose forward takes a batch and returns a loss: a
            mapping or object with "loss", a tuple (loss, ...), or a tensor of losses. May be a PeftModel.
        lam: a LatentActionModel, a folder or Hub id of one, or a module with `encode(frame_t, frame_future)` and
            `forward(frame_t, frame_future)` returning the same fields, and `latent_width`.
        layer: which hidden state, as an index into [embeddings, after block 1, ..., after block L]: -1 the last
            block, -3 the paper's L-2, k > 0 after block k. Also "L", "L-2".
        blocks: the DiT's blocks: the dotted path of a ModuleList, Sequential or ModuleDict, a path with * for numbered
            attributes ("net.block*"), several paths with commas, or the modules themselves in a container or list;
            None: by the policy table, else by structure.
        frames: batch key of uint8 [0, 255] or float [0, 1] frames [B, 2, 3, H, W] (present, future) or
            [B, V, 2, 3, H, W], with optional flags bool [B] under `<key>_valid`; or a callable(first argument of the
            policy's forward) -> FramePair. With several views the one prediction is aligned with each view's latent
            action and the losses are averaged.
        token: "last_valid" (the last action step of each sample that is not padding), "mean_valid", "last", an int
            (step of the action chunk), or a callable(hidden [R, S, D], batch) -> [R, D].
        projector: "mlp" (paper), "linear" (official release), or a module from the hidden width to the latent width.
        alignment: "cosine" (LARA, Eq. 6), "contrastive" (in-batch InfoNCE), or a callable(projected [B, W],
            latent [B, W]) -> [B].
        align_weight: w1 >= 0: a float, a schedule of :mod:`lara_adapter.schedules`, or a callable(step) -> float.
        lam_weight: w2 >= 0, likewise. Both constant 0: LARA is idle and training is bit-identical to never attaching.
        lam_grad_scale: factor >= 0 on the alignment gradient that reaches the LAM (1: the paper; 0: stop-gradient).
        reconstruct: part of the pairs, drawn anew at each step, whose future frame the LAM predicts, in (0, 1]; all are
            encoded and aligned. L_LAM is then an unbiased estimate, without most of the cost of forward dynamics and
            LPIPS. 1: all, the paper's. Below 1 the LAM's forward has to take `reconstruct` and `draw`, as ours does.
        train_lam: False: frozen LAM (LARA, Eq. 5); its loss is not computed.
        add_to_loss: False: the policy's loss is unchanged, and you add `lara.losses.total` yourself.
        frames_optional: True: a batch without frames (the key is absent, or the callable returns None) counts for nothing
            in LARA, as in co-training with vision-language data that may not reach the DiT. The total is then exactly 0 and
            its graph holds every trainable parameter of LARA, so that ranks with and without frames can be mixed; the step
            counts such a forward, `lara.metrics()` is empty after it. False: such a batch is an error.
        entry: method that the training loop calls with the batch and that returns the loss, as a dotted path:
            "compute_loss", "training_step", "model.loss"; None: the row's, which is "forward" for most policies.
        spec: row of the policy table for this call; None: the one registered for the policy's class. It is saved with the
            adapter, but for a callable `action_tokens`.

    Returns:
        The adapter, registered in the policy's tree as `lara`.

    Raises:
        TapNotFound: the blocks, the layer or the entry cannot be found, or several lists of blocks fit.
        AttachOrderError: the policy is wrapped, compiled, prepared or has LARA already, or something is on the meta device.
        LaraArgumentError: an argument has a value outside the above.
        AdapterFormatError: `lam` is a folder or repository without a latent action model.
    """
    _enable_loggers()
    if entry is not None:
        spec = replace(spec or find_spec(_unwrap_peft(policy)), entry=entry)
    peft, given = policy, spec
    policy, spec, tap = locate(policy, layer, blocks, spec)
    check_entry(policy, spec.entry)
    _refuse_meta("the policy", policy)
    check_rule(token)
    check_weight("align_weight", align_weight)
    check_weight("lam_weight", lam_weight)
    if callable(lam_grad_scale):
        raise LaraArgumentError("attach_lara: lam_grad_scale is callable, but a finite number >= 0 is expected")
    check_weight("lam_grad_scale", lam_grad_scale)
    reconstruct = check_share("attach_lara: reconstruct", reconstruct)
    if not isinstance(frames, str) and not callable(frames):
        raise LaraArgumentError(f"attach_lara: frames={frames!r}, but a batch key or a callable is expected")
    align, align_json = resolve_alignment(alignment)
    lam = _resolve_lam(lam)
    for name, module in (("the LAM", lam), ("projector=", projector)):
        if isinstance(module, nn.Module):
            _refuse_meta(name, module)
    if _shares_parameters(lam, policy):
        raise LaraArgumentError(
            "attach_lara: the LAM shares parameters with the policy; give each policy a LAM of its own (copy.deepcopy(lam))"
        )
    width = _latent_width(lam)
    if reconstruct < 1 and train_lam and not _takes_part(lam):
        raise LaraArgumentError(
            f"attach_lara: reconstruct={reconstruct}, but the forward of {type(lam).__name__} does not take "
            f"{' and '.join(sorted(_TO_RECONSTRUCT))}; use reconstruct=1, or take them as LatentActionModel.forward does"
        )
    if frames == DEFAULT_FRAMES:
        frames = spec.frames
    config = LaraConfig(
        layer=tap.layer,
        depth=tap.depth,
        blocks=tap.blocks,
        tap=tap.path,
        tap_kind=tap.kind,
        hidden_width=None if isinstance(projector, nn.Module) else tap.width,
        latent_width=width,
        frames=frames if isinstance(frames, str) else None,
        token=token if isinstance(token, (str, int)) else None,
        projector=projector if isinstance(projector, str) else None,
        alignment=align_json,
        align_weight=weight_to_json(align_weight),
        lam_weight=weight_to_json(lam_weight),
        lam_grad_scale=float(lam_grad_scale),
        reconstruct=reconstruct,
        train_lam=bool(train_lam),
        add_to_loss=bool(add_to_loss),
        frames_optional=bool(frames_optional),
        policy_family=spec.name,
        row=None if given is None or given == find_spec(policy) else row_to_json(given),
        policy_class=type(policy).__name__,
        origins=origins_of(policy, lam),
        lara_version=__version__,
    )
    # a forked generator, so that attaching does not change what the policy draws afterwards
    with torch.random.fork_rng(devices=[]):
        head = build_projector(projector, tap.width, width)
    if align_weight != 0 or lam_weight != 0:  # else nothing of LARA trains
        trained_in_float32(head, "projector")
        if train_lam:
            trained_in_float32(lam, "lam")
    adapter = LaraAdapter(
        Binding(policy, None if peft is policy else peft, spec, tap),
        lam,
        head,
        config,
        frames=frames,
        token=token,
        alignment=align,
        align_weight=align_weight,
        lam_weight=lam_weight,
    )
    adapter.to(_device_of(policy.get_submodule(tap.path), policy))
    adapter.binding.install(adapter)
    unsure = doubt(policy, tap.blocks) if blocks is None and spec.blocks is None and not spec.classes else None
    if unsure:
        logger.warning("%s", unsure)
    return adapter


def locate(
    policy: nn.Module, layer: int | str, blocks: Blocks | None, spec: PolicySpec | None = None
) -> tuple[nn.Module, PolicySpec, Tap]:
    """Find where LARA goes in a policy, without changing it.

    Args:
        policy: as for :func:`attach_lara`; may be on the meta device.
        layer: likewise.
        blocks: likewise.
        spec: likewise.

    Returns:
        The policy without its PeftModel, the row of the policy table that applies, and the tap.

    Raises:
        TapNotFound: the blocks, the layer or the entry cannot be found, or several lists of blocks fit.
        AttachOrderError: the policy is wrapped, compiled, prepared or has LARA already.
        LaraArgumentError: the policy is not a module, `layer` not a layer, or `blocks` neither a name nor modules.
    """
    policy = _unwrap_peft(policy)
    _refuse_wrapped(policy)
    spec = spec or find_spec(policy)
    if blocks is not None:
        blocks = blocks_name(policy, blocks)
        if spec.blocks is not None and same_blocks(policy, blocks, spec.blocks):
            blocks = None
        else:
            # other blocks: how the row reads its own does not apply, what it says of the sequence and the batch does
            spec = replace(spec, blocks=None, tap="output", norm=PolicySpec.norm, final_norm=None)
    return policy, spec, resolve_tap(policy, layer, blocks, spec)


@overload
def load_lara(
    policy: nn.Module, repo_or_dir: str | Path, *, revision: str | None = None, inference: Literal[False] = False,
    merge: bool = False, **overrides: Any,
) -> LaraAdapter: ...  # fmt: skip


@overload
def load_lara(
    policy: nn.Module, repo_or_dir: str | Path, *, revision: str | None = None, inference: Literal[True],
    merge: bool = False, **overrides: Any,
) -> nn.Module: ...  # fmt: skip


def load_lara(
    policy: nn.Module,
    repo_or_dir: str | Path,
    *,
    revision: str | None = None,
    inference: bool = False,
    merge: bool = False,
    **overrides: Any,
) -> LaraAdapter | nn.Module:
    """Attach a saved adapter; or, with `inference=True`, turn a base policy into the post-trained one.

    To go on training: with the optimizer's state, which you restore, the run continues bit-identically. What was saved of
    the policy (LoRA, `save_policy="trainable"`) is loaded into it.

    To act: LoRA and trained weights are loaded into `policy`, and nothing else of LARA is read or downloaded. `policy`
    itself is returned, in eval mode, so that its class, methods and references to it stay valid.

    Args:
        policy: a policy like the one it was saved from, not yet attached. With LoRA in the folder: to train, the PeftModel;
            to act, the base policy (or a PeftModel that has the same LoRA).
        repo_or_dir: folder written by `lara.save_pretrained`, or a Hub repository id.
        revision: branch, tag or commit of the repository; None: its main branch.
        inference: load the policy to act, see above.
        merge: with `inference`: merge the LoRA into the weights, so that nothing of peft remains; for a PeftModel the
            policy inside is returned. False: LoRA stays in separate layers beside frozen weights.
        **overrides: arguments of :func:`attach_lara` that replace the saved ones (needed for what was a callable).

    Returns:
        The adapter; with `inference` the policy.

    Raises:
        AdapterFormatError: truncated, foreign or newer files, or tensors that do not fit this policy or LAM; with
            `inference` also a folder without weights of the policy.
        AttachOrderError: the policy is wrapped, compiled, prepared or has LARA already.
        HubError: the repository cannot be reached, found or read.
        HostNotInstalled: there is LoRA to apply, and peft is missing.
        LaraArgumentError: `merge` without `inference`, or `inference` with overrides.
        TapNotFound: this policy does not have the saved blocks or layer.
    """
    if inference:
        if overrides:
            raise LaraArgumentError(f"load_lara: {sorted(overrides)} are settings of training, but inference=True")
        _refuse_wrapped(_unwrap_peft(policy))
        return read_adapter(repo_or_dir, revision, acting=True).act(policy, merge=merge)
    if merge:
        raise LaraArgumentError(
            "load_lara: merge=True needs inference=True; LoRA that is trained further is not merged"
        )
    saved = read_adapter(repo_or_dir, revision)
    arguments = {**saved.arguments, **overrides}
    missing = sorted(name for name, value in arguments.items() if value is None and name != "blocks")
    if missing:
        raise AdapterFormatError(
            f"{saved.source} was saved with callables or modules for {missing}, which cannot be stored; "
            f"pass them: load_lara(policy, ..., {missing[0]}=...)"
        )
    if "lam" not in arguments:
        raise AdapterFormatError(
            f"{saved.source} does not have a latent action model; pass it: load_lara(policy, ..., lam=...)"
        )
    same_tap = not overrides.keys() & {"layer", "blocks", "spec"}
    if same_tap and "spec" not in arguments:
        arguments["spec"] = _saved_spec(policy, saved.config)
    adapter = attach_lara(policy, arguments.pop("lam"), arguments.pop("layer"), **arguments)
    try:
        saved.restore(adapter)
    except BaseException:
        adapter.detach()
        raise
    now, before = adapter.config.tap, saved.config.tap
    if same_tap and now != before:
        logger.warning("%s was saved with the state at %s, but here it is read at %s", saved.source, before, now)
    warn_of_others(saved.config.origins, adapter.config.origins)
    adapter.config.origins = {**saved.config.origins, **adapter.config.origins}
    return adapter


# ---------------------------------------------------------------------- checks of the arguments


def _saved_spec(policy: nn.Module, config: LaraConfig) -> PolicySpec:
    """The row of the policy table; the state after the last block is read where the saved adapter read it."""
    policy = _unwrap_peft(policy)
    spec = find_spec(policy)
    own_norms = spec.tap == "norm" and (spec.name, spec.blocks) == (config.policy_family, config.blocks)
    after_last = own_norms and config.layer == config.depth
    if after_last and config.tap in (path for path, _ in policy.named_modules()):
        return replace(spec, final_norm=config.tap)
    return spec


def _enable_loggers() -> None:
    """Hosts that configure logging when they are imported (Prismatic, starVLA: `disable_existing_loggers`) silence ours."""
    for name, known in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == __name__.partition(".")[0] and isinstance(known, logging.Logger):
            known.disabled = False


def _unwrap_peft(policy: nn.Module) -> nn.Module:
    """The model inside a PeftModel: the wrapper calls its forward, and it outlives merge_and_unload."""
    if not isinstance(policy, nn.Module):
        raise LaraArgumentError(f"attach_lara: policy is a {type(policy).__name__}, but an nn.Module is expected")
    return unwrapped(policy)


def _refuse_wrapped(policy: nn.Module) -> None:
    for path, module in policy.named_modules():
        if path and any(cls.__name__ == "LaraAdapter" for cls in type(module).__mro__):
            raise AttachOrderError(
                f"attach_lara: this policy has LARA already, at {path!r}; policy.{path}.detach() first"
            )
    for path, module in policy.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        where = path or "the policy itself"
        for wrapper, fix in _WRAPPERS.items():
            # a compiled part is fine as long as it has not run: a hook added to a block later still fires
            if wrapper in names and (wrapper != "OptimizedModule" or not path):
                raise AttachOrderError(f"attach_lara: {where} is wrapped in {wrapper}; {fix}")
        if "FSDPModule" in names:
            raise AttachOrderError(
                f"attach_lara: {where} is sharded by fully_shard; attach_lara first, then fully_shard"
            )
    if getattr(policy, "_compiled_call_impl", None) is not None:
        raise AttachOrderError("attach_lara: policy.compile() was called already; attach_lara first, then compile")
    if getattr(policy, "_is_accelerate_prepared", False) or "_original_forward" in policy.__dict__:
        raise AttachOrderError(
            "attach_lara: the policy was prepared by accelerate already; order: attach_lara, optimizer, accelerator.prepare"
        )


def _refuse_meta(what: str, module: nn.Module) -> None:
    """A module without values cannot be trained, and the `to_empty` that gives it memory would wipe the LAM's weights.

    Not in :func:`locate`: a policy on the meta device can be described.

    Raises:
        AttachOrderError: a parameter is on the meta device.
    """
    name = next((name for name, p in module.named_parameters() if p.is_meta), None)
    if name is not None:
        raise AttachOrderError(
            f"attach_lara: {what} has no values yet: its parameter {name!r} is on the meta device. Materialise first: "
            "to_empty(device=...) and load_state_dict, or from_pretrained without a meta device; then attach_lara. "
            "accelerate's offload (a device_map with 'cpu' or 'disk') also leaves parameters there, and cannot be trained"
        )


def _resolve_lam(lam: nn.Module | str | Path) -> nn.Module:
    if isinstance(lam, (str, Path)):
        from .lam import LatentActionModel

        return LatentActionModel.from_pretrained(lam)
    if not isinstance(lam, nn.Module) or not callable(getattr(lam, "encode", None)):
        raise LaraArgumentError(
            f"attach_lara: lam is a {type(lam).__name__}, but a LatentActionModel, a folder or Hub id of one, or a module "
            "with encode and forward is expected"
        )
    return lam


def _takes_part(lam: nn.Module) -> bool:
    """Whether its forward can reconstruct a part of the pairs."""
    return _TO_RECONSTRUCT.issubset(inspect.signature(lam.forward).parameters)


def _latent_width(lam: nn.Module) -> int:
    width = getattr(lam, "latent_width", None)
    if not isinstance(width, int) or width < 1:
        raise LaraArgumentError(
            f"attach_lara: lam.latent_width is {width!r}, but the number of values of a latent action (tokens x width) is "
            "expected"
        )
    return width


def _shares_parameters(lam: nn.Module, policy: nn.Module) -> bool:
    own = {id(p) for p in policy.parameters()}
    return any(id(p) in own for p in lam.parameters())


def _device_of(module: nn.Module, policy: nn.Module) -> torch.device:
    for parameter in (*module.parameters(), *policy.parameters()):
        return parameter.device
    return torch.device("cpu")
