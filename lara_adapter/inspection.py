"""What LARA would do with a policy (`lara inspect`). Nothing is attached, changed or allocated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .attach import attach_lara, locate
from .blocks import Blocks, block_paths
from .check import prove_batch
from .entry import check_entry
from .errors import AttachOrderError, LaraArgumentError, LaraError, TapNotFound
from .heads import block_candidates, doubt
from .lam import LatentActionConfig
from .lam.checkpoint import locate as locate_lam
from .lam.checkpoint import read_config
from .lam.model import count_parameters
from .lam.outside import OutsideTree
from .policies import PolicySpec, find_spec
from .tap import Tap
from .terms import build_projector
from .tokens import ACTION_KEYS, MASK_KEY, PADDING_KEY, TokenRule, check_rule

__all__ = ["PolicyReport", "describe_policy"]

_RULES = {
    "last_valid": "the last action step of each sample that is not padding",
    "mean_valid": "the mean of the action steps that are not padding",
    "last": "the last action step, padding or not; a sample that has padding there does not count",
}
_DRAWS = {
    None: "one draw per sample",
    "tile": "several draws per sample, tiled: row j * B + i is sample i",
    "interleave": "several draws per sample, interleaved: row i * r + j is sample i",
}


@dataclass
class PolicyReport:
    """What LARA would do with a policy. `print(report)` is readable, :meth:`to_dict` is JSON.

    Attributes:
        policy_class: class name of the policy, without its PeftModel.
        family: row of the policy table that applies; "generic" if none does.
        found_by: how the blocks were located: "table", "structure" or "user".
        policy_parameters: parameters of the policy.
        policy_trainable: those of them that require a gradient.
        error: why LARA cannot attach, or None. If it cannot, the fields of the tap and of what LARA adds are None.
        candidates: lists of attention blocks in the policy, as {"path", "count", "block"}.
        blocks: name of the blocks: a dotted path, numbered attributes with *, or several paths with commas.
        block_class: class name of a block.
        depth: number of blocks L.
        width: width of the hidden state; None if unknown.
        tap: dotted path of the module that the hook is on.
        tap_kind: "output": a forward hook reads its output; "input": a pre-hook reads its input.
        layer: absolute index into [embeddings, after block 1, ..., after block L].
        blocks_below: blocks at or below the tap.
        trainable_blocks_below: those of them that have trainable parameters.
        trainable_elsewhere: trainable parameters outside the list of blocks.
        action_tokens: which positions of the sequence are action tokens: "last" or "first" T, or the token id, or the batch
            key of that id, or "callable".
        steps_from: batch keys that T and the padding are read from, in this order.
        token: the token rule; "callable" for a function.
        frames: batch key of the frames.
        frames_valid: batch key of their flags.
        adapter: dotted path at which the adapter is registered.
        draws: "tile", "interleave", or None: one noise draw per sample.
        lam: the latent action model that the numbers are for.
        lam_assumed: no LAM was given; the paper's is assumed.
        latent_shape: (N, D) of the latent action; None for a LAM that has only `latent_width`.
        latent_width: N * D.
        projector: "mlp", "linear" or the class of a module.
        projector_parameters: trainable parameters of the projector.
        lam_parameters: parameters of the LAM in the module tree.
        lam_trainable: those of them that train.
        outside: frozen networks that the LAM keeps outside the module tree: name, and parameters where known.
        entry: method that training calls with the batch.
        proof: with a batch: which token and rows are aligned, and whether moving the action proves it.
        problems: with a batch: what is wrong, with the argument that fixes it.
        warnings: what will not work as expected.
    """

    policy_class: str
    family: str
    found_by: str
    policy_parameters: int
    policy_trainable: int
    error: str | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    blocks: str | None = None
    block_class: str | None = None
    depth: int | None = None
    width: int | None = None
    tap: str | None = None
    tap_kind: str | None = None
    layer: int | None = None
    blocks_below: int | None = None
    trainable_blocks_below: int | None = None
    trainable_elsewhere: int | None = None
    action_tokens: str | int | None = None
    steps_from: list[str] = field(default_factory=list)
    token: str | int | None = None
    frames: str | None = None
    frames_valid: str | None = None
    adapter: str | None = None
    draws: str | None = None
    lam: str | None = None
    lam_assumed: bool = False
    latent_shape: tuple[int, int] | None = None
    latent_width: int | None = None
    projector: str | None = None
    projector_parameters: int | None = None
    lam_parameters: int | None = None
    lam_trainable: int | None = None
    outside: dict[str, int | None] = field(default_factory=dict)
    entry: str | None = None
    proof: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if LARA can attach, and a batch showed no problem."""
        return self.error is None and not self.problems

    @property
    def added(self) -> int | None:
        """Parameters that LARA adds to the policy's tree, trainable or not."""
        return None if self.lam_parameters is None else (self.projector_parameters or 0) + self.lam_parameters

    @property
    def added_trainable(self) -> int | None:
        """Trainable parameters that LARA adds."""
        return None if self.lam_trainable is None else (self.projector_parameters or 0) + self.lam_trainable

    @property
    def added_relative(self) -> float | None:
        """`added` over the policy's own parameters; None if it has none."""
        return None if self.added is None or not self.policy_parameters else self.added / self.policy_parameters

    def to_dict(self) -> dict[str, Any]:
        """Every field and `ok`, `added`, `added_trainable`, `added_relative`, as JSON values."""
        computed = {name: getattr(self, name) for name in ("ok", "added", "added_trainable", "added_relative")}
        return {**asdict(self), "latent_shape": self.latent_shape and list(self.latent_shape), **computed}

    def __str__(self) -> str:
        return "\n".join(f"{name:<12}{text}" for name, text in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        located = {"table": "known to the policy table", "structure": "found by structure", "user": "blocks as given"}
        yield "policy", f"{self.policy_class}; family: {self.family}, {located[self.found_by]}"
        yield "", f"{self.policy_parameters:,} parameters, {self.policy_trainable:,} trainable"
        if self.error is not None:
            yield "CANNOT", f"attach LARA: {self.error.removeprefix('attach_lara: ')}"
            for candidate in self.candidates if self.blocks is None else ():
                yield "candidate", "{path}: {count} x {block}".format(**candidate)
            return
        width = "width unknown" if self.width is None else f"width {self.width}"
        yield "blocks", f"{self.blocks}: {self.depth} x {self.block_class}, {width}"
        state = f"after block {self.layer} of {self.depth}" if self.layer else "the embeddings, before block 1"
        reads = "what it returns" if self.tap_kind == "output" else "what it is given"
        yield "tap", f"{self.tap}, {reads}: layer {self.layer}, {state}"
        elsewhere = f"{self.trainable_elsewhere:,} trainable parameters outside the blocks"
        yield "below it", f"{self.trainable_blocks_below} of {self.blocks_below} blocks trainable; {elsewhere}"
        keys = [f'batch["{key}"]' for key in self.steps_from]
        where = f"the {self.action_tokens} T positions of the sequence"
        if self.action_tokens not in ("last", "first"):
            where = f"where input_ids is {self.action_tokens!r}"
        yield "actions", f"{where}; T and padding from {keys[0]},"
        yield "", f"else from {keys[1]}, else T alone from {' or '.join(keys[2:])}"
        meaning = _RULES.get(str(self.token), "" if self.token == "callable" else "this step of the action chunk")
        yield "token", f"{self.token}: {meaning}" if meaning else f"{self.token}"
        yield "frames", f'batch["{self.frames}"]: uint8 in [0, 255] or float in [0, 1], now and C steps later,'
        yield "", "[B, 2, 3, H, W], or [B, V, 2, 3, H, W] for V views"
        yield "", f'batch["{self.frames_valid}"]: bool [B], optional; False past the end of the episode'
        yield "", "or from attach_lara(frames=callable), given the first argument of the policy's forward"
        yield "noise", _DRAWS[self.draws]
        yield "adapter", f"registered as policy.{self.adapter}"
        yield "entry", f"training calls policy.{self.entry}"
        if self.proof is not None:
            yield "proof", self.proof
        yield from self._adds()
        for problem in self.problems:
            yield "PROBLEM", problem
        for warning in self.warnings:
            yield "WARNING", warning

    def _adds(self) -> Iterator[tuple[str, str]]:
        shape = "x".join(map(str, self.latent_shape)) if self.latent_shape else str(self.latent_width)
        assumed = ", assumed: no LAM was given" if self.lam_assumed else ""
        yield "LAM", f"{self.lam}, latent {shape}{assumed}"
        share = self.added_relative
        size = "" if share is None else (f", {share:.2%} of" if share < 1 else f", {share:,.0f} x") + " the policy"
        yield "adds", f"{self.added:,} parameters, {self.added_trainable:,} trainable{size}:"
        frozen = "" if self.lam_trainable else " (frozen)"
        yield "", f"{self.projector} projector {self.projector_parameters:,}, LAM {self.lam_parameters:,}{frozen}"
        for name, count in self.outside.items():
            yield "", f"outside the module tree, frozen: {name}" + ("" if count is None else f", {count:,}")


def describe_policy(
    policy: nn.Module,
    lam: nn.Module | LatentActionConfig | str | Path | None = None,
    layer: int | str = -3,
    *,
    blocks: Blocks | None = None,
    token: TokenRule = "last_valid",
    projector: Literal["mlp", "linear"] | nn.Module = "mlp",
    train_lam: bool = True,
    entry: str | None = None,
    batch: Any = None,
    action: str | None = None,
) -> PolicyReport:
    """Report what :func:`lara_adapter.attach_lara` with the same arguments would do; the policy is not changed.

    The policy may be on the meta device: without a batch nothing is run, and the projector and the LAM are counted, not
    built.

    Args:
        policy: as for `attach_lara`.
        lam: a latent action model, its configuration, or a folder or Hub id of one, of which only `config.json` is read;
            None: the paper's is assumed.
        layer: which hidden state: -1 after the last block, -3 the paper's, k > 0 after block k; also "L-2".
        blocks: dotted path of the diffusion transformer's blocks, "net.block*" for numbered attributes, several paths
            with commas; None: they are searched for.
        token: last_valid, mean_valid, last, or a step of the action chunk.
        projector: mlp (the paper's) or linear (the official release's).
        train_lam: whether the latent action model trains along.
        entry: method that the training loop calls, as compute_loss or training_step; None: the row's, or forward.
        batch: a training batch, as for `lara.check`, to prove token and rows by moving its actions; needs no frames.
        action: batch key of the ground-truth action chunk; None: the row's, else action or actions.

    Returns:
        The report. If LARA cannot attach to this policy, its `error` says why.

    Raises:
        LaraArgumentError: an argument has a value that `attach_lara` would refuse for any policy.
        AdapterFormatError: `lam` is a folder or repository that holds no latent action model.
    """
    check_rule(token)
    if not isinstance(policy, nn.Module):
        raise LaraArgumentError(f"describe_policy: policy is a {type(policy).__name__}, but an nn.Module is expected")
    # first: an argument that is wrong for any policy is an error, not a finding about this one
    described = _describe_lam(lam, train_lam)
    _projector_size(projector, 1, described["latent_width"])
    inner, spec, tap, error = policy, find_spec(policy), None, None
    try:
        inner, spec, tap = locate(policy, layer, blocks)
    except (TapNotFound, AttachOrderError) as refused:
        error = str(refused)
    parameters = list(inner.parameters())
    report = PolicyReport(
        policy_class=type(inner).__name__,
        family=spec.name,
        found_by="table" if spec.blocks else ("structure" if blocks is None else "user"),
        policy_parameters=_count(parameters),
        policy_trainable=_count(p for p in parameters if p.requires_grad),
        error=error,
        candidates=[
            {"path": found.path, "count": len(found.blocks), "block": type(found.blocks[0]).__name__}
            for found in block_candidates(inner)
        ],
    )
    if tap is not None:
        _describe_tap(report, inner, spec, tap)
        unsure = doubt(inner, tap.blocks) if report.found_by == "structure" else None
        report.warnings += [unsure] if unsure else []
        report.token = token if isinstance(token, (str, int)) else "callable"
        report.projector = projector if isinstance(projector, str) else type(projector).__name__
        for name, value in described.items():
            setattr(report, name, value)
        try:
            report.projector_parameters = _projector_size(projector, tap.width, described["latent_width"])
        except LaraArgumentError as refused:  # the width of the blocks is unknown
            report.error = str(refused)
        report.entry = entry or spec.entry
        try:
            check_entry(inner, report.entry)
        except TapNotFound as refused:
            report.error = report.error or str(refused)
    if batch is not None and report.error is None:
        _prove(report, policy, batch, {"layer": layer, "blocks": blocks, "token": token, "entry": entry}, action)
    return report


class _NoLam(nn.Module):
    """In place of a LAM where nothing is trained."""

    latent_width = 1

    def encode(self, frame_t: Any, frame_future: Any) -> Any:
        raise NotImplementedError


def _prove(report: PolicyReport, policy: nn.Module, batch: Any, arguments: dict[str, Any], action: str | None) -> None:
    quiet = logging.getLogger("lara_adapter.attach")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # what it would say of these arguments is in the report
    try:
        lara = attach_lara(policy, _NoLam(), projector=nn.Identity(), train_lam=False, **arguments)
        try:
            proof = prove_batch(lara, batch, action)
        finally:
            lara.detach()
    except LaraError as refused:  # a policy on the meta device, a token that cannot be located
        report.error = str(refused)
        return
    finally:
        quiet.setLevel(level)
    report.proof = proof.token if proof.rows == proof.token else f"{proof.token}; rows: {proof.rows}"
    report.problems += proof.problems


def _describe_tap(report: PolicyReport, policy: nn.Module, spec: PolicySpec, tap: Tap) -> None:
    blocks = [policy.get_submodule(path) for path in block_paths(policy, tap.blocks)]
    report.blocks, report.block_class = tap.blocks, type(blocks[0]).__name__
    report.depth, report.width = tap.depth, tap.width
    report.tap, report.tap_kind, report.layer = tap.path, tap.kind, tap.layer
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    report.blocks_below = tap.layer
    below = blocks[: tap.layer]
    report.trainable_blocks_below = sum(any(p.requires_grad for p in block.parameters()) for block in below)
    report.trainable_elsewhere = _count(p for p in policy.parameters() if p.requires_grad and id(p) not in in_blocks)
    where = spec.action_tokens
    report.action_tokens, report.draws = "callable" if callable(where) else where, spec.draws
    actions = [spec.action] if spec.action else ACTION_KEYS
    report.steps_from = [spec.mask or MASK_KEY, spec.padding or PADDING_KEY, *actions]
    report.frames, report.frames_valid = spec.frames, f"{spec.frames}_valid"
    report.adapter = f"{spec.owner}.lara".lstrip(".")
    if report.trainable_blocks_below == 0 and (tap.layer or not report.trainable_elsewhere):
        if report.trainable_elsewhere:
            effect = "the alignment reaches at most what feeds the blocks"
        elif any(p.requires_grad for block in blocks for p in block.parameters()):  # above the tap
            effect = "training will raise TapDetached; unfreeze the blocks, or wrap them in LoRA first"
        else:
            effect = "LARA trains its projector and the LAM, and not the policy; unfreeze the blocks, or add LoRA first"
        report.warnings.append(f"no block at or below the tap is trainable: {effect}")


def _describe_lam(lam: nn.Module | LatentActionConfig | str | Path | None, train_lam: bool) -> dict[str, Any]:
    """The fields of the report that depend on the LAM alone."""
    if lam is None:
        paper = _describe_config(LatentActionConfig.paper(), "LatentActionConfig.paper()", train_lam)
        return {**paper, "lam_assumed": True}
    if isinstance(lam, (str, Path)):
        return _describe_config(read_config(locate_lam(lam, None)), str(lam), train_lam)
    if isinstance(lam, LatentActionConfig):
        return _describe_config(lam, type(lam).__name__, train_lam)
    width, shape = getattr(lam, "latent_width", None), getattr(lam, "latent_shape", None)
    if not isinstance(lam, nn.Module) or not isinstance(width, int) or width < 1:
        raise LaraArgumentError(
            f"describe_policy: lam is a {type(lam).__name__} with latent_width={width!r}, but a LatentActionModel, its "
            "configuration, a folder or Hub id of one, or a module with an integer latent_width is expected"
        )
    networks = [m.network for m in lam.modules() if isinstance(m, OutsideTree) and m.network is not None]
    outside = {type(network).__name__: _count(network.parameters()) for network in networks}
    return {
        "lam": type(lam).__name__,
        "latent_shape": None if shape is None else tuple(shape),
        "latent_width": width,
        "lam_parameters": _count(lam.parameters()),
        "lam_trainable": _count(p for p in lam.parameters() if p.requires_grad and train_lam),
        "outside": outside,
    }


def _describe_config(config: LatentActionConfig, name: str, train_lam: bool) -> dict[str, Any]:
    count = count_parameters(config)
    outside: dict[str, int | None] = {} if config.image_encoder is None else {config.image_encoder: None}
    if config.perceptual_weight > 0 and train_lam:
        outside["LPIPS"] = None
    return {
        "lam": name,
        "latent_shape": (config.queries, config.latent_dim),
        "latent_width": config.queries * config.latent_dim,
        "lam_parameters": count,
        "lam_trainable": count if train_lam else 0,
        "outside": outside,
    }


def _projector_size(projector: str | nn.Module, hidden_width: int | None, latent_width: int) -> int:
    """Trainable parameters of the projector that `attach_lara` would build; it is not allocated."""
    head = build_projector(projector, hidden_width, latent_width, device="meta")
    return _count(p for p in head.parameters() if p.requires_grad)


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
