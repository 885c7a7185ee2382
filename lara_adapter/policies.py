"""The table of known policy families: the only module of the core that names a host.

A row says where the blocks of the action head are, how a block's output is read, which positions of the sequence are
action tokens, under which batch key the frames arrive, and where the adapter is registered. A policy without a row works
too: its blocks are found by structure or named by the user.

Third parties add rows with :func:`register_policy`, or through the entry-point group
`lara_adapter.policies` (each entry a :class:`PolicySpec` or a list of them).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import nn

from .errors import LaraArgumentError

__all__ = ["GENERIC", "PolicySpec", "find_spec", "register_policy", "row_named", "unwrapped"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "lara_adapter.policies"


@dataclass(frozen=True)
class PolicySpec:
    """How LARA attaches to one family of policies.

    Attributes:
        name: short name, written into saved adapters.
        classes: classes it applies to, as "top-level package:ClassName"; subclasses match too.
        blocks: dotted path from the policy to the container of the DiT's blocks (ModuleList, Sequential or ModuleDict), a
            name with * for numbered attributes ("net.block*"), or several paths with commas; None: found by structure.
        tap: "output": the host calls its blocks, a forward hook reads what they return. "norm": the host never
            calls its blocks in training (it calls their parts), a pre-hook on the next block's first norm reads
            the residual stream.
        norm: name of the first norm inside a block, for `tap="norm"`.
        final_norm: dotted path of the norm that reads the last block's state, for `tap="norm"`.
        action_tokens: whether the T action tokens are the "last" or the "first" T positions of the sequence; or, where
            they are inside a language model's sequence, their token id in `batch["input_ids"]`, the batch key of that id,
            or a callable(batch) -> bool [B, S].
        frames: batch key of the frames; `<frames>_valid` is the key of their flags.
        owner: dotted path of the submodule under which the adapter is registered as `lara`; "" is the policy.
        draws: order in which a host repeats each sample for several noise draws in one batch. "tile": row
            j * B + i is sample i; "interleave": row i * r + j is sample i; None: it does not.
        entry: method that the training loop calls with the batch and that returns the loss, as a dotted path: "forward",
            "compute_loss", "training_step", "model.loss".
        action: batch key of the ground-truth action chunk [B, T, A]; None: "action" or "actions".
        mask: batch key of the valid steps, bool [B, T] or [B, T, A]; None: "action_mask".
        padding: batch key of the padded steps, bool [B, T]; None: "action_is_pad".
        loss: key of the loss in what the entry returns; None: "loss".
        state: which of several hidden states a block returns: an index into its tuple or a key; None: it returns one.
        run: which run is read where the blocks run several times in one call, 0 the first, -1 the last; None: the one
            with a gradient, or all of them where each has a part of the samples.
        layout: "batch": the state is [B, S, D]; "sequence": it is [S, B, D].
    """

    name: str
    classes: tuple[str, ...] = ()
    blocks: str | None = None
    tap: Literal["output", "norm"] = "output"
    norm: str = "input_layernorm"
    final_norm: str | None = None
    action_tokens: str | int | Callable[[Any], Any] = "last"
    frames: str = "lara_frames"
    owner: str = ""
    draws: Literal["tile", "interleave"] | None = None
    entry: str = "forward"
    action: str | None = None
    mask: str | None = None
    padding: str | None = None
    loss: str | None = None
    state: int | str | None = None
    run: int | None = None
    layout: Literal["batch", "sequence"] = "batch"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("tap", ("output", "norm")),
            ("draws", ("tile", "interleave", None)),
            ("layout", ("batch", "sequence")),
        ):
            if getattr(self, field) not in allowed:
                raise LaraArgumentError(
                    f"PolicySpec: {field}={getattr(self, field)!r}, but one of {allowed} is expected"
                )
        kinds: tuple[tuple[str, tuple[type, ...], str], ...] = (
            ("entry", (str,), "the name of a method"),
            ("action", (str, type(None)), "a batch key"),
            ("mask", (str, type(None)), "a batch key"),
            ("padding", (str, type(None)), "a batch key"),
            ("loss", (str, type(None)), "a key"),
            ("state", (int, str, type(None)), "an index or a key"),
            ("run", (int, type(None)), "the index of a run"),
        )
        for field, types, expected in kinds:
            value = getattr(self, field)
            if not isinstance(value, types) or isinstance(value, bool) or value == "":
                raise LaraArgumentError(f"PolicySpec: {field}={value!r}, but {expected} is expected")
        where = self.action_tokens
        if not (callable(where) or (isinstance(where, (str, int)) and not isinstance(where, bool) and where != "")):
            raise LaraArgumentError(
                f"PolicySpec: action_tokens={where!r}, but 'last', 'first', a token id, a batch key of one, or a "
                "callable(batch) -> bool [B, S] is expected"
            )
        if self.tap == "norm" and not (self.blocks and self.final_norm):
            raise LaraArgumentError("PolicySpec: tap='norm' needs blocks= and final_norm= as dotted paths")
        for entry in self.classes:
            if entry.count(":") != 1:
                raise LaraArgumentError(f"PolicySpec: classes entry {entry!r}, but 'package:ClassName' is expected")


GENERIC = PolicySpec("generic")

_DIT = "action_head.model.transformer_blocks"
_EXPERT = "paligemma_with_expert.gemma_expert.model"
_LEROBOT_FRAMES = "observation.lara.frames"  # LeRobot's processors keep only observation.* keys

_TABLE: list[PolicySpec] = [
    PolicySpec("gr00t-n1.5", ("gr00t:GR00T_N1_5",), _DIT),
    PolicySpec("gr00t-n1.6", ("gr00t:Gr00tN1d6",), _DIT),
    PolicySpec("gr00t-n1.7", ("gr00t:Gr00tN1d7",), _DIT),
    PolicySpec("lerobot-groot", ("lerobot:GrootPolicy",), f"_groot_model.{_DIT}", frames=_LEROBOT_FRAMES),
    # pi0 and pi0.5 restore only what is under policy.model, so that is where the adapter lives
    PolicySpec(
        "lerobot-pi",
        ("lerobot:PI0Policy", "lerobot:PI05Policy"),
        f"model.{_EXPERT}.layers",
        tap="norm",
        final_norm=f"model.{_EXPERT}.norm",
        frames=_LEROBOT_FRAMES,
        owner="model",
    ),
    PolicySpec(
        "lerobot-smolvla",
        ("lerobot:SmolVLAPolicy",),
        "model.vlm_with_expert.lm_expert.layers",
        tap="norm",
        final_norm="model.vlm_with_expert.lm_expert.norm",
        frames=_LEROBOT_FRAMES,
    ),
    PolicySpec(
        "lerobot-multi-task-dit",
        ("lerobot:MultiTaskDiTPolicy",),
        "noise_predictor.transformer_blocks",
        frames=_LEROBOT_FRAMES,
    ),
    PolicySpec(
        "lerobot-xvla",
        ("lerobot:XVLAPolicy",),
        "model.transformer.blocks",
        action_tokens="first",
        frames=_LEROBOT_FRAMES,
    ),
    # vla_jepa hands only policy.model to its optimizer and repeats the batch by tiling
    PolicySpec(
        "lerobot-vla-jepa",
        ("lerobot:VLAJEPAPolicy",),
        "model.action_model.model.transformer_blocks",
        frames=_LEROBOT_FRAMES,
        owner="model",
        draws="tile",
    ),
    PolicySpec(
        "openpi",
        ("openpi:PI0Pytorch",),
        f"{_EXPERT}.layers",
        tap="norm",
        final_norm=f"{_EXPERT}.norm",
    ),
    PolicySpec(
        "lerobot-evo1",
        ("lerobot:Evo1Policy",),
        "model.action_head.transformer_blocks",
        frames=_LEROBOT_FRAMES,
    ),
    # its action tokens stand inside the language model's sequence, before the end of the turn and the padding
    PolicySpec(
        "lerobot-eo1",
        ("lerobot:EO1Policy",),
        "model.vlm_backbone.model.language_model.layers",
        action_tokens="action_token_id",
        frames=_LEROBOT_FRAMES,
    ),
    PolicySpec("cogact", ("vla:CogACT",), "action_model.net.blocks", action="actions", draws="tile"),
    PolicySpec("rdt-1b", ("models:RDTRunner",), "model.blocks", action="action_gt"),
    PolicySpec(
        "starvla",
        ("starVLA:Qwen_GR00T", "starVLA:Qwen_PI", "starVLA:Cosmos_GR00T"),
        "action_model.model.transformer_blocks",
        loss="action_loss",
        draws="tile",
    ),
    # the blocks are a decoder's, or an encoder's where there is no decoder: found by structure
    PolicySpec(
        "diffusion-policy",
        ("diffusion_policy:DiffusionTransformerLowdimPolicy", "diffusion_policy:DiffusionTransformerHybridImagePolicy"),
        entry="compute_loss",
    ),
    PolicySpec("flower", ("flower:FLOWERVLA",), "dit", entry="training_step", action="actions"),
    # its configure_optimizers names its parts one by one
    PolicySpec(
        "mdt-v",
        ("mdt:MDTVAgent",),
        "model.inner_model.decoder.blocks",
        entry="training_step",
        action="actions",
        owner="model.inner_model",
    ),
    PolicySpec(
        "dexvla",
        ("qwen2_vla:Qwen2VLForConditionalGenerationForVLA",),
        "policy_head.blocks",
        action="actions",
        padding="is_pad",
        loss="loss.loss",
        draws="tile",
    ),
    PolicySpec("dexvla-scaledp", ("models:ScaleDP",), "blocks", action="actions", padding="is_pad", draws="tile"),
]


def register_policy(spec: PolicySpec) -> None:
    """Add a row to the table; it wins over earlier rows for the same class.

    Args:
        spec: the row.

    Raises:
        LaraArgumentError: the spec names no class.
    """
    if not spec.classes:
        raise LaraArgumentError("register_policy: spec.classes is empty; name at least one 'package:ClassName'")
    _TABLE.insert(0, spec)


@lru_cache(maxsize=1)
def _entry_point_rows() -> tuple[PolicySpec, ...]:
    rows: list[PolicySpec] = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
        except Exception as error:  # a broken plug-in must not keep other policies from attaching
            logger.warning("policy entry point %s could not be loaded: %s", entry.value, error)
            continue
        rows += [loaded] if isinstance(loaded, PolicySpec) else list(loaded)
    return tuple(rows)


def find_spec(policy: nn.Module) -> PolicySpec:
    """The row for a policy, by the names of its class and base classes; :data:`GENERIC` if there is none."""
    names = [f"{cls.__module__.partition('.')[0]}:{cls.__name__}" for cls in type(policy).__mro__]
    rows = [*_TABLE, *_entry_point_rows()]
    for name in names:
        for spec in rows:
            if name in spec.classes:
                return spec
    return GENERIC


def row_named(name: str) -> PolicySpec | None:
    """The row of this name that wins; None if there is none."""
    return next((spec for spec in (*_TABLE, *_entry_point_rows()) if spec.name == name), None)


def unwrapped(policy: nn.Module) -> nn.Module:
    """The policy inside a PeftModel; another module itself."""
    if any(cls.__name__ == "PeftModel" for cls in type(policy).__mro__):
        return policy.get_base_model()  # type: ignore[operator]
    return policy
