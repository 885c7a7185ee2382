"""The settings of an adapter, as written to `lara_config.json` and read back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import AdapterFormatError, LaraArgumentError
from .losses import resolve_alignment
from .policies import PolicySpec, row_named
from .schedules import check_share, check_weight, weight_from_json
from .storage.untrusted import short
from .tokens import check_rule

__all__ = ["SCHEMA_VERSION", "LaraConfig", "row_to_json"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DEFAULT_FRAMES = "lara_frames"  # batch key of the frames, where the policy table names no other


@dataclass
class LaraConfig:
    """The arguments of `attach_lara` and what they resolved to.

    Attributes:
        layer: absolute index into [embeddings, after block 1, ..., after block L].
        depth: number of blocks L of the policy it was attached to.
        blocks: name of the blocks: a dotted path, numbered attributes with *, or several paths with commas.
        tap: dotted path of the hooked module.
        tap_kind: "output" or "input".
        frames: batch key of the frames, or None where a callable was given.
        token: "last_valid", "mean_valid", "last", an int, or None where a callable was given.
        projector: "mlp", "linear", or None where a module was given.
        alignment: {"name": ..., settings}, or None where a callable was given.
        align_weight: w1: a number, {"schedule": ..., settings}, or None where a callable was given.
        lam_weight: w2, likewise.
        lam_grad_scale: factor on the alignment gradient that reaches the LAM.
        reconstruct: part of the pairs whose future frame the LAM predicts, in (0, 1]; 1 is the paper's.
        train_lam: False is the frozen variant (LARA, Eq. 5).
        add_to_loss: whether the terms are folded into the policy's loss.
        frames_optional: whether a batch may have no frames.
        hidden_width: width of the tapped state.
        latent_width: N * D of the latent action.
        policy_family: name of the row of the policy table.
        row: the row itself, where it was given for this call and is not the table's; `action_tokens` is None where it is a
            callable.
        policy_class: class name of the policy.
        origins: "policy", "lam" and "image_encoder" where they came from the Hub, each {"repo_id", "revision"} with the
            commit.
        lara_version: version that wrote the file.
        schema_version: of the file.
    """

    layer: int
    depth: int
    blocks: str
    tap: str
    tap_kind: str
    hidden_width: int | None
    latent_width: int
    frames: str | None = DEFAULT_FRAMES
    token: str | int | None = "last_valid"
    projector: str | None = "mlp"
    alignment: dict[str, Any] | None = field(default_factory=lambda: {"name": "cosine"})
    align_weight: Any = 0.01
    lam_weight: Any = 0.01
    lam_grad_scale: float = 1.0
    reconstruct: float = 1.0
    train_lam: bool = True
    add_to_loss: bool = True
    frames_optional: bool = False
    policy_family: str = "generic"
    row: dict[str, Any] | None = None
    policy_class: str = ""
    origins: dict[str, Any] = field(default_factory=dict)
    lara_version: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "lara_config.json") -> LaraConfig:
        """Read settings strictly.

        Args:
            content: the JSON object.
            source: where it comes from, for messages.

        Raises:
            AdapterFormatError: not an adapter, of a newer schema, or a field is missing or of the wrong type.
        """
        version = content.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise AdapterFormatError(f"{source} has schema_version={short(version)}: not an adapter of lara_adapter")
        if version > SCHEMA_VERSION:
            raise AdapterFormatError(
                f"{source} has schema_version={version}, but this lara_adapter reads up to {SCHEMA_VERSION}; upgrade it"
            )
        values = _known(content, fields(cls), source)
        missing = sorted(
            {"layer", "depth", "blocks", "tap", "tap_kind", "hidden_width", "latent_width"} - values.keys()
        )
        if missing:
            raise AdapterFormatError(f"{source} lacks {missing}")
        _check_types(values, _TYPES, source)
        return cls(**values)

    def arguments(self, source: str = "lara_config.json") -> dict[str, Any]:
        """The arguments of `attach_lara`, except the LAM; None for what was a callable or a module.

        Args:
            source: where the settings come from, for messages.

        Raises:
            AdapterFormatError: a setting is out of range.
        """
        if self.projector not in (None, "mlp", "linear") or self.tap_kind not in ("output", "input"):
            raise AdapterFormatError(
                f"{source}: projector={short(self.projector)}, tap_kind={short(self.tap_kind)}: not known to this version"
            )
        if self.latent_width < 1 or self.depth < 1 or (self.hidden_width is not None and self.hidden_width < 1):
            raise AdapterFormatError(f"{source}: a width or depth below 1")
        try:
            weights = {name: weight_from_json(getattr(self, name)) for name in ("align_weight", "lam_weight")}
            for name, weight in (*weights.items(), ("lam_grad_scale", self.lam_grad_scale)):
                if weight is not None:
                    check_weight(name, weight)
            check_share("reconstruct", self.reconstruct)
            if self.token is not None:
                check_rule(self.token)
            if self.alignment is not None:
                resolve_alignment(self.alignment)
        except (LaraArgumentError, TypeError) as error:
            raise AdapterFormatError(f"{source} holds a setting out of range: {short(str(error))}") from error
        arguments = {**{name: getattr(self, name) for name in _ARGUMENTS}, **weights}
        known = row_named(self.policy_family)
        if self.row is not None:
            known = row_from_json(self.row, f"{source}: row")
            arguments["spec"] = None if self.row.get("action_tokens", "") is None else known
        # None for a row's own blocks: another spec= then brings its own
        arguments["blocks"] = None if known is not None and self.blocks == known.blocks else self.blocks
        return arguments


# the fields that are arguments of attach_lara
_ARGUMENTS = ("layer", "frames", "token", "projector", "alignment", "lam_grad_scale", "reconstruct", "train_lam",
              "add_to_loss", "frames_optional")  # fmt: skip


def row_to_json(spec: PolicySpec) -> dict[str, Any]:
    """A row of the policy table as JSON values; None for a callable."""
    values = {item.name: getattr(spec, item.name) for item in fields(spec)}
    return {name: None if callable(v) else list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def row_from_json(content: dict[str, Any], source: str) -> PolicySpec:
    """A row of the policy table from what :func:`row_to_json` wrote; "last" for a callable `action_tokens`.

    Raises:
        AdapterFormatError: a field is missing, of the wrong type or out of range.
    """
    values = _known(content, fields(PolicySpec), source)
    if values.get("action_tokens", "") is None:
        del values["action_tokens"]
    _check_types(values, _ROW_TYPES, source)
    if not all(isinstance(entry, str) for entry in values.get("classes", ())):
        raise AdapterFormatError(f"{source}: classes={short(values['classes'])}, but a list of str is expected")
    if "name" not in values:
        raise AdapterFormatError(f"{source} lacks ['name']")
    try:
        return PolicySpec(**{**values, "classes": tuple(values.get("classes", ()))})
    except LaraArgumentError as error:
        raise AdapterFormatError(f"{source} holds a setting out of range: {short(str(error))}") from error


def _known(content: dict[str, Any], items: Any, source: str) -> dict[str, Any]:
    names = {item.name for item in items}
    unknown = sorted(content.keys() - names)
    if unknown:
        logger.warning("%s: unknown settings ignored: %s", source, short(unknown))
    return {name: value for name, value in content.items() if name in names}


def _check_types(values: dict[str, Any], allowed: dict[str, tuple[type, ...]], source: str) -> None:
    for name, value in values.items():
        types = allowed[name]
        if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise AdapterFormatError(
                f"{source}: {name}={short(value)}, but {' or '.join(t.__name__ for t in types)} is expected"
            )


def _allowed_types(annotation: Any) -> tuple[type, ...]:
    """The types that a field's annotation allows in JSON; () for anything. An int is allowed for a float."""
    types: list[Any] = []
    for member in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        origin = get_origin(member) or member
        if origin is Literal:
            types += {type(value) for value in get_args(member)}
        elif origin is not Callable:
            types += [list] if origin is tuple else [origin, int] if origin is float else [origin]
    return () if Any in types else tuple(types)


_WEIGHT_TYPES = (int, float, dict, type(None))
_TYPES = {name: _allowed_types(annotation) for name, annotation in get_type_hints(LaraConfig).items()}
_TYPES |= {"align_weight": _WEIGHT_TYPES, "lam_weight": _WEIGHT_TYPES}
_ROW_TYPES = {name: _allowed_types(annotation) for name, annotation in get_type_hints(PolicySpec).items()}
