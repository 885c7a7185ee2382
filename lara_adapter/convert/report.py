"""The report of a conversion: what was read, mapped and dropped; as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError
from ..storage.files import read_json
from .frames import FrameRange

__all__ = ["FORMAT", "RECORD", "ConversionReport", "recorded_files", "recorded_frames"]

FORMAT = "lara_adapter.conversion"
RECORD = "conversion.json"

PATCH_ORDER = (
    "reading order for both frames; the official code draws a new random order for each frame unless its ViTMAEModel is "
    "given noise=arange"
)


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """One conversion, as written to `conversion.json` beside its result.

    Attributes:
        source: as passed.
        revision: commit of a Hub snapshot, else as passed.
        destination: folder that was written.
        source_layout: "lara_adapter", "official" (the release's) or "moto".
        target_layout: likewise.
        prefix: of the latent action model's tensors in the source; "" unless it is in a policy's checkpoint.
        read: file to sha256, of everything that was read.
        tensors: official tensors that were mapped.
        parameters: numbers in them.
        dtypes: of the tensors; not changed.
        image_encoder: Hub id or folder that the result names, and why.
        frames_mean: what the official model's frames are normalised with, per channel; 0 for frames in [0, 1].
        frames_std: likewise; 1 for frames in [0, 1].
        frames_reason: why these are assumed.
        frames_folded: whether the decoder's first and last maps were rescaled for them; else weights are bit-identical.
        patch_order: order of the encoder's tokens of a frame.
        dropped: what the result does not have, with the reason.
        notes: other differences.
        written: file to sha256, of everything in the destination except this report.
    """

    source: str
    revision: str | None
    destination: str
    source_layout: str
    target_layout: str
    prefix: str
    read: dict[str, str]
    tensors: int
    parameters: int
    dtypes: list[str]
    image_encoder: str
    frames_mean: tuple[float, ...]
    frames_std: tuple[float, ...]
    frames_reason: str
    frames_folded: bool
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    patch_order: str = PATCH_ORDER

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        from .. import __version__

        return {"format": FORMAT, "lara_version": __version__, **asdict(self)}

    def __str__(self) -> str:
        unit = self.frames_mean == (0.0, 0.0, 0.0) and self.frames_std == (1.0, 1.0, 1.0)
        shown = "[0, 1]" if unit else f"normalised by mean {self.frames_mean}, std {self.frames_std}"
        folded = "; folded into the decoder's first and last linear maps" if self.frames_folded else ""
        lines = [
            f"{self.source} ({self.source_layout}) -> {self.destination} ({self.target_layout})",
            f"read           {', '.join(self.read)}" + (f" (tensors {self.prefix}*)" if self.prefix else ""),
            f"mapped         {self.tensors} tensors, {self.parameters:,} numbers, {', '.join(self.dtypes)}",
            f"image encoder  {self.image_encoder}",
            f"frames         of the official model: {shown} ({self.frames_reason}){folded}",
            f"patch order    {self.patch_order}",
            *(f"dropped        {what}: {why}" for what, why in self.dropped.items()),
            *(f"note           {note}" for note in self.notes),
            f"written        {', '.join([*self.written, RECORD])}",
        ]
        return "\n".join(lines)


def recorded_frames(folder: Path) -> FrameRange | None:
    """The range of frames recorded by an earlier conversion to an official layout, if there was one.

    Raises:
        AdapterFormatError: the record is damaged.
    """
    path, content = folder / RECORD, _read_record(folder)
    if not content:
        return None
    values: list[Any] = [content.get(name) for name in ("frames_mean", "frames_std")]
    if not all(isinstance(value, list) and [type(x) in (int, float) for x in value] == 3 * [True] for value in values):
        raise AdapterFormatError(
            f"{path} is damaged: frames_mean, frames_std = {values}; two times three numbers are expected"
        )
    mean, std = (tuple(map(float, value)) for value in values)
    if min(std) <= 0:
        raise AdapterFormatError(f"{path} is damaged: frames_std = {std}, but numbers > 0 are expected")
    return FrameRange(mean, std)  # type: ignore[arg-type]  # three each, checked above


def recorded_files(folder: Path) -> dict[str, str]:
    """File to sha256 of what an earlier conversion wrote into a folder; empty if there was none.

    Raises:
        AdapterFormatError: the record is damaged.
    """
    written = _read_record(folder).get("written")
    return {str(name): str(sha) for name, sha in written.items()} if isinstance(written, dict) else {}


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of an earlier conversion; empty if there is none."""
    content = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    return content if content.get("format") == FORMAT else {}
