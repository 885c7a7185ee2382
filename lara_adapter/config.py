"""The settings of an adapter, as written to `lara_config.json` and read back."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import AdapterFormatError
from .untrusted import short

__all__ = ["SCHEMA_VERSION", "LaraConfig"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass
class LaraConfig:
    """What `attach_lara` was asked for and what it resolved to.

    Attributes:
        layer: absolute index into [embeddings, after block 1, ..., after block L].
        depth: number of blocks L of the policy it was attached to.
        blocks: dotted path of the blocks.
        tap: dotted path of the hooked module.
        tap_kind: "output" or "input".
        frames: batch key of the frames, or None where a callable was given.
        token: "last_valid", "mean_valid", "last", an int, or None where a callable was given.
        projector: "mlp", "linear", or None where a module was given.
        alignment: {"name": ..., settings}, or None where a callable was given.
        align_weight: w1: a number, {"schedule": ..., settings}, or None where a callable was given.
        lam_weight: w2, likewise.
        lam_grad_scale: factor on the alignment gradient that reaches the LAM.
        train_lam: False is the frozen variant (LARA, Eq. 5).
        add_to_loss: whether the terms are folded into the policy's loss.
        hidden_width: width of the tapped state.
        latent_width: N * D of the latent action.
        policy_family: name of the row of the policy table.
        policy_class: class name of the policy.
        origins: "policy", "lam" and "image_encoder" as far as they came from the Hub, each {"repo_id", "revision"} with the
            commit that was resolved.
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
    frames: str | None = "lara_frames"
    token: str | int | None = "last_valid"
    projector: str | None = "mlp"
    alignment: dict[str, Any] | None = field(default_factory=lambda: {"name": "cosine"})
    align_weight: Any = 0.01
    lam_weight: Any = 0.01
    lam_grad_scale: float = 1.0
    train_lam: bool = True
    add_to_loss: bool = True
    policy_family: str = "generic"
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
            AdapterFormatError: no adapter of ours, written by a newer schema, or a field is missing or of the wrong type.
        """
        version = content.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise AdapterFormatError(f"{source} has schema_version={short(version)}: no adapter of lara_adapter")
        if version > SCHEMA_VERSION:
            raise AdapterFormatError(
                f"{source} has schema_version={version}, but this lara_adapter reads up to {SCHEMA_VERSION}; upgrade it"
            )
        known = {item.name: item for item in fields(cls)}
        unknown = sorted(content.keys() - known.keys())
        if unknown:
            logger.warning("%s: unknown settings ignored: %s", source, short(unknown))
        values = {name: value for name, value in content.items() if name in known}
        missing = sorted(
            {"layer", "depth", "blocks", "tap", "tap_kind", "hidden_width", "latent_width"} - values.keys()
        )
        if missing:
            raise AdapterFormatError(f"{source} lacks {missing}")
        for name, value in values.items():
            wanted = _TYPES.get(name)
            if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
                raise AdapterFormatError(
                    f"{source}: {name}={short(value)}, but {' or '.join(t.__name__ for t in wanted)} is wanted"
                )
        return cls(**values)


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "layer": (int,),
    "depth": (int,),
    "blocks": (str,),
    "tap": (str,),
    "tap_kind": (str,),
    "hidden_width": (int, _NONE),
    "latent_width": (int,),
    "frames": (str, _NONE),
    "token": (str, int, _NONE),
    "projector": (str, _NONE),
    "alignment": (dict, _NONE),
    "align_weight": (int, float, dict, _NONE),
    "lam_weight": (int, float, dict, _NONE),
    "lam_grad_scale": (int, float),
    "train_lam": (bool,),
    "add_to_loss": (bool,),
    "policy_family": (str,),
    "policy_class": (str,),
    "origins": (dict,),
    "lara_version": (str,),
}
