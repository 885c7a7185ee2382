"""`lara.check(batch, optimizer)`: show on one batch that the LARA gradients reach what they should, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .blocks import block_paths
from .errors import FrameError, LaraArgumentError, OptimizerCoverageError
from .frames import frame_keys, read_features
from .hostcall import read_frames
from .hostlog import each_message_once
from .metrics import without_negatives
from .proof import Proof, prove

__all__ = ["CheckReport", "check_optimizer", "prove_batch", "run_check"]

_ROUNDING = 0.05  # by which a latent may differ between features of 16 bits and of 32


@dataclass
class CheckReport:
    """The result of one forward and backward of the LARA terms alone; readable with `print(report)`.

    Attributes:
        tap: dotted path of the hooked module.
        layer: absolute layer index.
        losses: align, lam, total.
        valid_fraction: share of the batch's pairs that count.
        blocks_below: blocks at or below the tap that have trainable parameters.
        blocks_reached: those of them that got a gradient.
        blocks_above_reached: blocks above the tap that got a gradient (must be 0).
        projector_reached: whether the projector got a gradient.
        lam_reached: whether the LAM got a gradient; None with a frozen LAM.
        parameters: trainable parameters that LARA adds.
        optimizer_covers: whether the optimizer holds all of them; None without one.
        token: which token is aligned, and whether moving the action proves it: "token 16 of 17: proven".
        rows: likewise the rows of each sample: "proven (8 draws, tile)".
        proven: whether token and rows are both proven.
        problems: what is wrong, one sentence each.
    """

    tap: str
    layer: int
    losses: dict[str, float]
    valid_fraction: float
    blocks_below: int
    blocks_reached: int
    blocks_above_reached: int
    projector_reached: bool
    lam_reached: bool | None
    parameters: int
    optimizer_covers: bool | None
    token: str = ""
    rows: str = ""
    proven: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        lam = "frozen" if self.lam_reached is None else ("reached" if self.lam_reached else "NOT reached")
        optimizer = {None: "not given", True: "holds every LARA parameter", False: "INCOMPLETE"}[self.optimizer_covers]
        lines = [
            f"tap        {self.tap} fired (layer {self.layer})",
            f"losses     {', '.join(f'{name} {value:.4f}' for name, value in self.losses.items())}",
            f"pairs      {self.valid_fraction:.0%} valid",
            f"proof      {self.token}; rows: {self.rows}",
            f"gradient   {self.blocks_reached} of {self.blocks_below} trainable blocks at or below the tap, "
            f"{self.blocks_above_reached} above it; projector {'reached' if self.projector_reached else 'NOT reached'}; "
            f"LAM {lam}",
            f"optimizer  {optimizer} ({self.parameters:,} trainable parameters)",
            *(f"PROBLEM    {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


def run_check(
    adapter: Any, batch: Any, optimizer: torch.optim.Optimizer | None, action: str | None = None
) -> CheckReport:
    """Run one training forward and the backward of the LARA terms, and restore everything.

    That is gradients, buffers, the LAM's weights (a forward may refresh its codebook), the modes, the random state, the
    step. Under torch.distributed call it on every rank.

    Args:
        adapter: an attached adapter.
        batch: what the policy's entry takes: one argument; a mapping, given as one argument or, where the entry's
            parameters are its keys, as keywords; or a tuple of positional arguments.
        optimizer: the optimizer that will train; None: not checked.
        action: batch key of the ground-truth action chunk, to prove token and rows; None: the row's.

    Raises:
        OptimizerCoverageError: the optimizer lacks trainable LARA parameters.
        LaraArgumentError: LARA is detached, idle (both weights 0) or disabled.
        LaraError: whatever a training step raises: TapNeverFired, FrameError, NonFiniteError, ...
    """
    with each_message_once():
        return _run_check(adapter, batch, optimizer, action)


def _run_check(adapter: Any, batch: Any, optimizer: torch.optim.Optimizer | None, action: str | None) -> CheckReport:
    policy = adapter.policy
    if not adapter.attached or adapter._idle or not adapter._enabled:
        state = "detached" if not adapter.attached else "idle (both weights are 0)" if adapter._idle else "disabled"
        raise LaraArgumentError(f"lara.check: LARA is {state}, so there is nothing to check")
    covers = None if optimizer is None else check_optimizer(adapter, optimizer)
    with _no_trace(adapter, policy):
        policy.train()
        args, kwargs = _arguments(adapter, batch)
        module, method = adapter.binding.entry_of(policy)
        getattr(module, method)(*args, **kwargs)
        losses = adapter.losses
        losses.total.backward()
        values = adapter.metrics(record=False)
        if not values and adapter.config.frames_optional:
            raise FrameError("lara.check: this batch has no frames, so LARA does nothing on it; pass one that has some")
        report = _report(adapter, policy, values, covers)
        report.problems += _features_problem(adapter, args, kwargs)
    proof = prove_batch(adapter, batch, action)
    report.token, report.rows, report.proven = proof.token, proof.rows, proof.proven
    report.problems += proof.problems
    return report


def _report(adapter: Any, policy: nn.Module, values: dict[str, float], covers: bool | None) -> CheckReport:
    blocks = [policy.get_submodule(path) for path in block_paths(policy, adapter.config.blocks)]
    below = blocks[: adapter.config.layer]
    tied = {id(p) for block in below for p in block.parameters()}  # weights that blocks above the tap may share
    above = [[p for p in block.parameters() if id(p) not in tied] for block in blocks[adapter.config.layer :]]
    trainable_below = [b for b in below if any(p.requires_grad for p in b.parameters())]
    reached = sum(_has_gradient(block.parameters()) for block in trainable_below)
    leaked = sum(map(_has_gradient, above))
    frozen = not adapter.config.train_lam
    projector = _has_gradient(adapter.projector.parameters())
    lam = None if frozen else _has_gradient(adapter.lam.parameters())
    problems = []
    if values["valid_fraction"] == 0:
        problems.append(
            "no pair of this batch counts: the future frames are past the episodes' ends, or all is padding"
        )
    negatives = without_negatives(values.get("compared_pairs", 2))
    if negatives is not None:
        problems.append(negatives)
    if adapter._align_weight != 0:
        if not projector:
            problems.append("no gradient reached the projector")
        if trainable_below and reached < len(trainable_below):
            problems.append(f"only {reached} of {len(trainable_below)} trainable blocks below the tap got a gradient")
    if lam is False:
        problems.append("no gradient reached the LAM")
    if leaked:
        problems.append(f"{leaked} blocks above the tap got a gradient")
    return CheckReport(
        tap=adapter.config.tap,
        layer=adapter.config.layer,
        losses={name: values[key] for name, key in (("align", "align_loss"), ("lam", "lam_loss"), ("total", "total"))},
        valid_fraction=values["valid_fraction"],
        blocks_below=len(trainable_below),
        blocks_reached=reached,
        blocks_above_reached=leaked,
        projector_reached=projector,
        lam_reached=lam,
        parameters=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        optimizer_covers=covers,
        problems=problems,
    )


@torch.no_grad()
def _features_problem(adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Whether cached features that a batch brings are those of its frames, which may have changed since."""
    call, taken = adapter.read_call(args, kwargs)
    if taken is None or taken[2] is None or not adapter._lam_takes_features:
        return []
    pair = read_frames(call, adapter._frames, taken)
    assert pair is not None
    features = read_features(taken[2], pair)
    if features is None or not bool(pair.valid.any()):
        return []
    row = int(pair.valid.to(torch.uint8).argmax())
    frames = pair.present[row], pair.future[row]
    given = adapter.lam.encode(*frames, features=features[row]).continuous
    own = adapter.lam.encode(*frames).continuous
    if float((given - own).norm() / own.norm().clamp_min(1e-12)) < _ROUNDING:
        return []
    return [
        "the cached features of this batch are not those of its frames: wrap the collate function that runs last, so that "
        "nothing changes the frames afterwards (prefetch_features)"
    ]


def _has_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in parameters)


def check_optimizer(adapter: Any, optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer holds every trainable LARA parameter.

    Raises:
        OptimizerCoverageError: it lacks some; the message names them.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in adapter.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OptimizerCoverageError(
            f"the optimizer lacks {len(missing)} trainable LARA parameters, among them {missing[:4]}: they would never be "
            "trained. Create it after attach_lara from policy.parameters(), or optimizer.add_param_group for each of "
            "lara.param_groups(lr)"
        )
    return True


def prove_batch(adapter: Any, batch: Any, action: str | None = None) -> Proof:
    """Prove token and rows on one batch and restore everything; see :mod:`lara_adapter.proof`.

    Args:
        adapter: an attached adapter.
        batch: as for :func:`run_check`; it needs no frames.
        action: batch key of the ground-truth action chunk; None: the row's.
    """
    with _no_trace(adapter, adapter.policy):
        adapter.policy.train()
        call, _ = adapter.read_call(*_arguments(adapter, batch))
        return prove(adapter.binding, adapter._token, adapter.select, call, action)


def _arguments(adapter: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is handed to the entry: positional and keyword arguments."""
    binding = adapter.binding
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return batch, {}
    if isinstance(batch, Mapping):
        frames = adapter._frames if isinstance(adapter._frames, str) else None
        # iterating over a TensorDict gives rows
        keys = {str(key) for key in batch.keys()} - set(frame_keys(frames) if frames else ())  # noqa: SIM118
        known = keys & set(binding.names)
        if keys and (known == keys or (binding.accepts_any and (known or not binding.names))):
            return (), dict(batch)
    # Lightning's training_step(batch, batch_idx)
    return (batch, 0)[: 2 if binding.names[1:2] == ("batch_idx",) else 1], {}


@contextlib.contextmanager
def _no_trace(adapter: Any, policy: nn.Module) -> Iterator[None]:
    parameters = list(policy.parameters())
    gradients = [p.grad for p in parameters]
    modes = [(module, module.training) for module in policy.modules()]
    saved = [(t, t.detach().clone()) for t in (*policy.buffers(), *adapter.lam.parameters())]
    names = ("_losses", "_values", "_verified", "_seen_frames", "_blank_forwards")
    attributes = {name: adapter.__dict__[name] for name in names}
    calls = adapter._monitor._calls
    for p in parameters:
        p.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient
        with torch.no_grad():
            for tensor, before in saved:
                tensor.data.copy_(before)
        for module, mode in modes:
            module.training = mode
        adapter.__dict__.update(attributes)
        adapter._monitor._calls = calls
