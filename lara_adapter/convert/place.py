"""Find a latent action model among the tensors of a checkpoint, by its codebook."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import AdapterFormatError
from .source import Weights

__all__ = ["FOLDER", "Place", "place_in"]

FOLDER = "latent_motion_tokenizer"  # of the tokenizer: folder in a policy's folder, module in its action head
_CODES = "vector_quantizer.embedding.weight"
_HEAD = "pred_latent_motion_head"


class Place(NamedTuple):
    """The position of a latent action model in a checkpoint.

    prefix: of its names; "" if it is the whole checkpoint.
    names: its tensors, with the prefix.
    projector: weight and bias of the projector beside it; empty if there is none.
    depth: blocks of the diffusion transformer beside it; 0 if they are not where the projector reads a block's output.
    blocks: dotted path of those blocks.
    others: tensors that belong to none of these.
    """

    prefix: str
    names: list[str]
    projector: list[str]
    depth: int
    blocks: str
    others: int

    @property
    def in_policy(self) -> bool:
        """Whether it is part of a policy of the official joint training."""
        return self.prefix.endswith(f"{FOLDER}.")


def place_in(weights: Weights) -> Place:
    """Find the latent action model by its codebook.

    Raises:
        AdapterFormatError: there is none, or more than one.
    """
    names = weights.names
    prefixes = [name.removesuffix(_CODES) for name in names if name == _CODES or name.endswith(f".{_CODES}")]
    if len(prefixes) != 1:
        what = f"{len(prefixes)} latent action models, at {prefixes}" if prefixes else f"no {_CODES}"
        raise AdapterFormatError(
            f"{weights.path} holds {what}, but one latent action model is expected; its {len(names)} tensors begin "
            f"with {names[:3]}"
        )
    prefix = prefixes[0]
    own = [name for name in names if name.startswith(prefix)]
    beside = prefix.removesuffix(f"{FOLDER}.") if prefix.endswith(f"{FOLDER}.") else None
    projector: list[str] = []
    blocks, numbers = "", set()
    if beside is not None:
        projector = [name for name in (f"{beside}{_HEAD}.weight", f"{beside}{_HEAD}.bias") if name in names]
        blocks = f"{beside}model.transformer_blocks"
        start = f"{blocks}."
        numbers = {name.removeprefix(start).partition(".")[0] for name in names if name.startswith(start)}
    depth = len(numbers) if numbers == {str(number) for number in range(len(numbers))} else 0
    return Place(prefix, own, projector, depth, blocks, len(names) - len(own) - len(projector))
