"""LaraAdapter: what `attach_lara` returns; holds the projector, the latent action model and their losses."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .binding import Binding, refuse_export
from .config import LaraConfig
from .errors import FrameError, HostOutputError, LaraArgumentError, NonFiniteError
from .frames import frame_keys, read_features
from .hostcall import HostCall, fold_loss, host_loss, read_frames, refuse_prediction
from .losses import Alignment, Contrastive, CosineDistance, masked_mean, scale_gradient
from .metrics import CollapseMonitor, History
from .policies import PolicySpec
from .schedules import Weight, weight_at
from .terms import (
    LaraLosses,
    align_rows,
    check_gradient,
    frozen_latent,
    latent_statistics,
    own_draws,
    project,
    read_values,
    stop_if_not_finite,
    trained_latent,
)
from .tokens import TokenRule, action_steps, batch_keys, select_rows, token_positions

if TYPE_CHECKING:
    import os

    from .check import CheckReport

__all__ = ["LaraAdapter", "LaraLosses"]

logger = logging.getLogger(__name__)


class LaraAdapter(nn.Module):
    """LARA on one policy. Made by :func:`lara_adapter.attach_lara`, never directly.

    It is registered in the policy's module tree as `lara`, so that the policy's optimizer, device moves, DDP, FSDP and
    checkpoints see its parameters.

    Attributes:
        lam: the latent action model.
        projector: from the tapped hidden state to the latent action's width; float32.
        config: what it was attached with.
        binding: its connection to the policy: the entry into `forward`, the hook, the policy and its PeftModel.
        history: what :meth:`metrics` returned so far, in bounded memory; for the picture of the model card.
        restored: whether its weights came from a saved adapter or a checkpoint.
        warned_of_frozen: whether it was said that nothing of the policy trains.
    """

    lam: nn.Module
    projector: nn.Module
    _step: torch.Tensor
    _direction: torch.Tensor
    _seed: torch.Tensor

    def __init__(
        self, binding: Binding, lam: nn.Module, projector: nn.Module, config: LaraConfig, *,
        frames: str | Callable[[Any], Any], token: TokenRule, alignment: Alignment, align_weight: Weight,
        lam_weight: Weight,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lam, self.projector = lam, projector
        self.config, self.binding = config, binding
        self._frames, self._token, self._alignment = frames, token, alignment
        self._align_weight, self._lam_weight = align_weight, lam_weight
        self._enabled, self._verified, self._warned_of_eval = True, False, False
        self.warned_of_frozen = False
        self.restored = False
        self._seen_frames: tuple[int, ...] | None = None  # [3, H, W] of the last batch, for one that has none
        self._blank_forwards = 0
        self._losses: LaraLosses | None = None
        self._values: dict[str, torch.Tensor | float] = {}
        self.history = History()
        self._monitor = CollapseMonitor(contrastive=isinstance(alignment, Contrastive))
        # not of torch's default dtype and device: a meta device would lose the values, 16 bits round them
        self.register_buffer("_step", torch.zeros((), dtype=torch.long, device="cpu"))
        self.register_buffer("_direction", torch.zeros(config.latent_width, dtype=torch.float32, device="cpu"))
        self.register_buffer("_seed", torch.tensor(torch.initial_seed() % 2**31, device="cpu"))  # of a LAM's draws
        self._lam_flags = {name: p.requires_grad for name, p in lam.named_parameters()}
        self._lam_was_training = lam.training
        # both weights constant 0: idle, and frozen, so that DDP does not wait for its parameters
        self._idle = align_weight == 0 and lam_weight == 0
        if self._idle or not config.train_lam:
            lam.requires_grad_(False)
        if self._idle:
            projector.requires_grad_(False)
        takes = inspect.signature(lam.forward).parameters
        self._lam_takes_valid, self._lam_takes_features = "valid" in takes, "features" in takes
        # a LAM with dropout must not shift the policy's noise; ours draws nothing
        self._lam_draws = bool(getattr(lam, "draws_random_numbers", True))
        binding.quiet = self._idle
        # what is looked up in a batch that is not a mapping
        keys = frame_keys(frames) if isinstance(frames, str) else ()
        self._keys = (*keys, *batch_keys(binding.spec))
        self._trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        self.train(binding.policy.training)

    # ------------------------------------------------------------------ public

    @property
    def policy(self) -> nn.Module:
        """The policy it is attached to."""
        return self.binding.policy

    @property
    def spec(self) -> PolicySpec:
        """The row of the policy table that it was attached with."""
        return self.binding.spec

    @property
    def attached(self) -> bool:
        """False after :meth:`detach`."""
        return self.binding.attached

    @property
    def losses(self) -> LaraLosses:
        """The terms of the last training forward, with their graph until the next one.

        Raises:
            LaraArgumentError: no training forward has run yet.
        """
        if self._losses is None:
            raise LaraArgumentError("lara.losses: no training forward has run yet (policy.train(), grad enabled)")
        return self._losses

    @property
    def step(self) -> int:
        """Training forwards so far, with frames or without: the step of the schedules. Can be set."""
        return int(self._step)

    @step.setter
    def step(self, value: int) -> None:
        self._step.fill_(value)

    def metrics(self, *, record: bool = True) -> dict[str, float]:
        """The last training forward in plain floats; empty before the first, and after one in which LARA had no part
        (eval mode, `disabled()`, a batch without frames, blocks that ran past the entry).

        Keys: align_loss, lam_loss, total, align_weight, lam_weight, cosine (mean over valid pairs, [-1, 1]),
        valid_fraction, latent_std (per dimension over the batch, mean), mean_direction (|E[z/|z|]|^2 over recent
        batches, [0, 1]; near 1: collapsed); with the contrastive alignment compared_pairs (valid pairs of all ranks, each
        other's negatives: 2 are needed); and of a LAM that trains, where it reports them: reconstruction_loss (of the pairs
        that were reconstructed), copy_loss (of all), reconstruction_over_copy, codebook_loss, commitment_loss,
        perceptual_loss, perplexity, codes_used.

        Args:
            record: also add the values to :attr:`history`.

        Raises:
            NonFiniteError: a LARA term was NaN or infinite; under torch.compile it is noticed only here.
        """
        values = {} if self.binding.missed else {name: float(value) for name, value in self._values.items()}
        for name in ("align_loss", "lam_loss"):
            if name in values and values[name] - values[name] != 0:
                raise NonFiniteError(f"LARA's {name} is {values[name]}")
        if "compared_pairs" in values:  # under torch.compile it is noticed only here
            self._monitor.observe_negatives(values["compared_pairs"])
        if values and record:
            self.history.record(self.step, values)
        return values

    def param_groups(
        self, lr: float = 1e-4, lam_lr: float | None = None, weight_decay: float = 1e-5
    ) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable LARA parameters: projector and LAM, each with and without weight decay.

        For an optimizer that does not get `policy.parameters()` as a whole. Only weights of linear layers and convolutions
        are decayed.

        Args:
            lr: of the projector.
            lam_lr: of the LAM; None: `lr`.
            weight_decay: of the decayed weights.
        """
        groups: list[dict[str, Any]] = []
        for name, module, rate in (
            ("projector", self.projector, lr),
            ("lam", self.lam, lr if lam_lr is None else lam_lr),
        ):
            decayed = {
                id(part.weight)
                for part in module.modules()
                if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d))
            }
            trainable = [p for p in module.parameters() if p.requires_grad]
            for suffix, is_decayed, decay in (("", True, weight_decay), ("_no_decay", False, 0.0)):
                params = [p for p in trainable if (id(p) in decayed) is is_decayed]
                if params:
                    groups.append({"params": params, "lr": rate, "weight_decay": decay, "name": f"lara_{name}{suffix}"})
        return groups

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard as separate units (`for unit in lara.fsdp_units(): fully_shard(unit)`), before the root.

        The projector, and each child of the LAM with trainable parameters. Optional: LARA also works in the root's unit.
        """
        units = [self.projector, *self.lam.children()]
        return [unit for unit in units if any(p.requires_grad for p in unit.parameters())]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the policy runs as if LARA were not attached (on every rank or on none)."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def check(
        self, batch: Any, optimizer: torch.optim.Optimizer | None = None, *, action: str | None = None
    ) -> CheckReport:
        """Run one step on a copy of the gradients and report whether LARA works; see :mod:`lara_adapter.check`.

        Args:
            batch: what the policy's entry takes: one argument, or a tuple of positional arguments.
            optimizer: the optimizer that will train; None: not checked.
            action: batch key of the ground-truth action chunk, to prove token and rows; None: the row's.
        """
        from .check import run_check

        return run_check(self, batch, optimizer, action)

    def detach(self) -> None:
        """Remove LARA: the policy's class, modules, state_dict, hooks, flags and signature are as before.

        The LAM's `requires_grad` flags and mode are restored; the adapter keeps projector and LAM.

        Raises:
            AttachOrderError: it is already detached.
        """
        self.binding.remove()
        self._losses = None
        for name, parameter in self.lam.named_parameters():
            parameter.requires_grad_(self._lam_flags.get(name, parameter.requires_grad))
        self.lam.train(self._lam_was_training)

    def save_pretrained(self, folder: str | os.PathLike[str], *, save_policy: str | None = None, **card: Any) -> None:
        """Write the adapter; see :func:`lara_adapter.saving.write.save_adapter`.

        Args:
            folder: created or replaced, as a whole or not at all.
            save_policy: "trainable" also writes what was trained of the policy itself; its LoRA is always written.
            **card: `base_model`, `dataset`, `license` for the model card.
        """
        from .saving.write import save_adapter

        save_adapter(self, folder, save_policy=save_policy, **card)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the adapter; see :func:`lara_adapter.saving.write.push_adapter`."""
        from .saving.write import push_adapter

        return push_adapter(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, policy: nn.Module, repo_or_dir: str | os.PathLike[str], **kwargs: Any) -> LaraAdapter:
        """The same as :func:`lara_adapter.load_lara`."""
        from .attach import load_lara  # the one import upwards: a second name for a function

        return load_lara(policy, str(repo_or_dir), **kwargs)

    # ------------------------------------------------------------------ one call of the policy

    def run(
        self, module: nn.Module, own: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The policy's entry while LARA is attached.

        Args:
            module: the policy, or the part of it that has the entry.
            own: the instance's own entry; None: the class's.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
        """
        refuse_export()
        binding, spec = self.binding, self.spec
        call, taken = self.read_call(args, kwargs)
        if binding.running:
            return binding.pass_through(module, own, call)
        if not (binding.policy.training and torch.is_grad_enabled() and self._enabled) or self._idle:
            output = binding.pass_through(module, own, call)
            if torch.is_grad_enabled() and not self._idle and not torch.compiler.is_compiling():
                self._without_lara(output)
            return output
        first = not self._verified and not torch.compiler.is_compiling()
        if first:
            binding.verify(self, self._trainable)
            self._verified = True
        pair = read_frames(call, self._frames, taken, self.config.frames_optional)
        if pair is None:
            return self._without_frames(module, own, call)
        output, hidden = binding.run(module, own, call, len(pair.valid))
        if first and self.config.add_to_loss:
            refuse_prediction(output, spec.loss)
        vectors, has_action = self.select(hidden, call, len(pair.valid))
        real = pair.valid.to(vectors.device)
        valid = real.expand(len(vectors), -1) if has_action is None else real & has_action
        if self._align_weight == 0:
            vectors = vectors.detach()  # w1 = 0: not even a zero gradient may reach the policy
        else:
            check_gradient(hidden, self)
        features = read_features(taken[2] if taken and self._lam_takes_features else None, pair)
        terms = self(vectors, pair.present, pair.future, valid, real, features)
        self._store(terms, hidden)
        if not torch.compiler.is_compiling():
            if self.config.frames_optional:
                self._seen_frames = tuple(pair.present.shape[2:])
            self._monitor.observe(self._values, self.config.train_lam)
            if "compared_pairs" in self._values:
                self._monitor.observe_negatives(float(self._values["compared_pairs"]), len(real))
        if not self.config.add_to_loss:
            return output
        return fold_loss(output, terms["total"], terms["per_sample"], self._host_metrics, spec.loss)

    def _without_frames(self, module: nn.Module, own: Callable[..., Any] | None, call: HostCall) -> Any:
        """A forward on a batch without frames: LARA runs on one black pair that counts for nothing.

        DDP waits for a gradient of every parameter, and other ranks that have frames wait for this one wherever LARA
        gathers: contrastive alignment, codebook, sharded weights.

        Raises:
            FrameError: the size of the frames is not known yet.
        """
        output = self.binding.pass_through(module, own, call)
        size = getattr(getattr(self.lam, "config", None), "image_size", None)
        shape = (3, size, size) if isinstance(size, int) else self._seen_frames
        width = self.config.hidden_width or self.binding.tap.width
        if shape is None or width is None:
            raise FrameError(
                "the first batch has no frames (frames_optional=True), and the LAM does not state their size; begin with a "
                "batch that has some, or give the LAM a config.image_size"
            )
        device = self._step.device
        blank = torch.zeros(1, 1, *shape, dtype=torch.uint8, device=device)
        vectors = torch.zeros(1, 1, width, dtype=torch.float32, device=device)
        nothing = torch.zeros(1, dtype=torch.bool, device=device)
        terms = self(vectors, blank, blank, nothing[None], nothing)
        self._losses, self._values = LaraLosses(terms["align"], terms["lam"], terms["total"]), {}
        if not torch.compiler.is_compiling():
            stop_if_not_finite(vectors, terms, read_values(terms), self._step)
            self._blank_forwards += 1
            if self._blank_forwards == _PATIENCE and self._seen_frames is None:
                logger.warning(
                    "LARA is idle: none of the first %d batches has frames (frames=%r, frames_optional=True)",
                    _PATIENCE, self._frames,
                )  # fmt: skip
        if not self.config.add_to_loss:
            return output
        return fold_loss(output, terms["total"], None, dict, self.spec.loss)

    def select(self, hidden: torch.Tensor, call: HostCall, pairs: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The aligned vectors [r, B, D] of a tapped state and where they count [r, B]; see :func:`.tokens.select_rows`."""
        spec, rule = self.spec, self._token
        steps = positions = None
        if not callable(rule):
            steps, positions = action_steps(call.batch, spec), token_positions(call.batch, spec.action_tokens)
        return select_rows(
            hidden, steps, rule, pairs=pairs, width=self.config.hidden_width, where=spec.action_tokens,
            draws=spec.draws, batch=call.first, positions=positions, layout=spec.layout,
        )  # fmt: skip

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[HostCall, tuple[Any, ...] | None]:
        """A call of the entry with the frames taken out, and these where they are read by a batch key."""
        call = HostCall(self.binding.names, args, kwargs, self._keys)
        if not isinstance(self._frames, str):
            return call, None
        return call, call.take_frames(self._frames, self.binding.accepts_any)

    def _without_lara(self, output: Any) -> None:
        """Forget the metrics, and warn once of eval mode, if a call without LARA returned a loss to train on."""
        try:
            trains = host_loss(output, self.spec.loss).requires_grad
        except HostOutputError:
            return
        if not trains:
            return
        self._values = {}
        if not self.binding.policy.training and self._enabled and not self._warned_of_eval:
            self._warned_of_eval = True
            logger.warning(
                "LARA is idle: %s is in eval mode, and its loss has a graph. If this is training, call policy.train()",
                type(self.binding.policy).__name__,
            )

    def forward(
        self,
        vectors: torch.Tensor,
        present: torch.Tensor,
        future: torch.Tensor,
        valid: torch.Tensor,
        real: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Compute the LARA terms. A module's forward, so that FSDP and ZeRO-3 gather its parameters.

        Args:
            vectors: [r, B, D] the aligned hidden vectors, of r noise draws of each sample.
            present: [B, V, 3, H, W] frames.
            future: [B, V, 3, H, W] frames.
            valid: [r, B] bool, where the alignment counts: the pair is real and the action is not all padding.
            real: [B] bool, where the pair is real; the LAM also learns from pairs without an action.
            features: [B, V, K, P, E] of the frames, read by the data loader's workers; None: the LAM encodes them.

        Returns:
            align, lam, total: scalars; per_sample: [B] with mean `total`; and the values of metrics(), where a constant
                weight is a float.
        """
        batch, views = present.shape[:2]
        pairs = present.flatten(0, 1), future.flatten(0, 1)
        known: dict[str, Any] = {} if features is None else {"features": features.flatten(0, 1)}
        # a generator cannot be forked inside a compiled graph; there a LAM's draws do shift the policy's noise
        forked = self._lam_draws and self.training and not torch.compiler.is_compiling()
        with own_draws(self._seed + self._step) if forked else contextlib.nullcontext():
            if self.config.train_lam:
                flags = real.repeat_interleave(views)
                share = self.config.reconstruct
                # a function of seed and step: the host's random numbers stay its own, and a resumed run draws the same
                part: dict[str, Any] = {} if share == 1 else {"reconstruct": share, "draw": self._seed + self._step}
                latent, lam_loss, report = trained_latent(
                    self.lam, *pairs, flags, self._lam_takes_valid, **(part | known)
                )
            else:
                latent, lam_loss, report = frozen_latent(self.lam, *pairs, **known)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            target = latent.float().unflatten(0, (batch, views)).flatten(2)  # [B, V, N * D]
            projected = project(self.projector, vectors, target.shape[-1])
            scaled = scale_gradient(target, self.config.lam_grad_scale)
            rows, compared = align_rows(self._alignment, projected, scaled, valid, self.config.frames_optional)
            kept, count = torch.where(valid, rows, 0.0), valid.sum().clamp_min(1)
            align = kept.sum() / count
            now = self._step.clone()
            w1, w2 = weight_at(self._align_weight, now), weight_at(self._lam_weight, now)
            # one loss per sample with the same mean, for hosts that weight samples themselves
            weighted = w2 * lam_loss
            per_sample = kept.sum(0) * (w1 * batch / count) + weighted
            total = w1 * align + weighted
            with torch.no_grad():
                if isinstance(self._alignment, CosineDistance):
                    cosine = 1 - rows.detach()
                else:
                    cosine = torch.cosine_similarity(projected[:, :, None], target, dim=-1).mean(2)
                spread, direction = latent_statistics(target, real, self._direction, self._step)
                self._step.add_(1)
        return {
            "align": align,
            "lam": lam_loss,
            "total": total,
            "per_sample": per_sample,
            "align_weight": w1,
            "lam_weight": w2,
            "cosine": masked_mean(cosine, valid),
            "valid_fraction": valid.float().mean(),
            "latent_std": spread,
            "mean_direction": direction,
            **({} if compared is None else {"compared_pairs": compared.float()}),
            **report,
        }

    def _store(self, terms: dict[str, Any], hidden: torch.Tensor) -> None:
        """Keep what :attr:`losses` and :meth:`metrics` give.

        Raises:
            NonFiniteError: a LARA term is NaN or infinite, outside torch.compile.
        """
        self._losses = LaraLosses(terms["align"], terms["lam"], terms["total"])
        if torch.compiler.is_compiling():
            self._values = {
                _RENAMED.get(name, name): term.detach() if isinstance(term, torch.Tensor) else term
                for name, term in terms.items() if name != "per_sample"
            }  # fmt: skip
            return
        values = read_values(terms)  # the one thing that a step waits for
        self._values = {_RENAMED.get(name, name): value for name, value in values.items()}
        stop_if_not_finite(hidden, terms, values, self._step)

    def _host_metrics(self) -> dict[str, float]:
        return {f"lara/{name}": float(value) for name, value in self._values.items()}

    # ------------------------------------------------------------------ nn.Module, where its defaults would be wrong

    def train(self, mode: bool = True) -> LaraAdapter:
        """As nn.Module's, but a frozen LAM stays in eval mode."""
        super().train(mode)
        if not self.config.train_lam or self._idle:
            self.lam.eval()
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LaraAdapter:
        """As nn.Module's, but a cast of the policy to 16 bits leaves LARA's float32 weights as they are."""

        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            halved = moved.dtype in (torch.bfloat16, torch.float16) and tensor.dtype == torch.float32
            return tensor.to(moved.device) if halved else moved

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """A checkpoint without LARA loads strictly too: the adapter then keeps its weights."""
        if not any(name.startswith(prefix) for name in state_dict):
            logger.warning(
                "the checkpoint has no LARA weights (%s*): projector and LAM keep theirs. To continue a run without LARA, "
                "start a new one from its weights: its optimizer state does not fit",
                prefix,
            )
            state_dict.update(self.state_dict(prefix=prefix))
        else:
            self.restored = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without the graph of the last forward."""
        state = self.__dict__.copy()
        state["_losses"] = None
        state["_values"] = {name: float(value) for name, value in self._values.items()}
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> LaraAdapter:
        """A copy with its own LAM, bound to the copied policy, since EMA implementations zip the parameters of both."""
        double = type(self).__new__(type(self))
        memo[id(self)] = double
        double.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return double

    def rebind(self) -> None:
        """Bind LARA to the policy's entry again: of an unpickled policy, or after something has put its own back."""
        self.binding.bind_entry()

    def detached_copy(self) -> nn.Module:
        """A deep copy of the policy without LARA, for export, EMA teachers, serving."""
        return self.binding.detached_copy(self)

    def extra_repr(self) -> str:
        """The settings, in print(policy)."""
        c = self.config
        return f"layer={c.layer}/{c.depth}, tap={c.tap!r}, token={c.token!r}, train_lam={c.train_lam}"


_PATIENCE = 100  # training forwards without frames before that is said
_RENAMED = {"align": "align_loss", "lam": "lam_loss"}
