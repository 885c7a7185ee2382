"""What is wrong with a collection, in one form for the log, `videos.json` and errors: {"file", "what", "used"}.

used: "the rest" of the file; "left out": damaged episodes are, the others of the file are used; "no": nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..errors import DatasetError, LaraArgumentError
from .sources import Segment, Source, shown

__all__ = ["Fault", "damaged_episodes", "describe", "fault", "require_pairs", "unreadable", "warn_of"]

logger = logging.getLogger(__name__)

Fault = dict[str, str]


def fault(source: Source, what: str, used: str) -> Fault:
    """An entry of the report."""
    inside = f" ({source.inside})" if source.inside and source.kind == "video" else ""
    return {"file": shown(source.path) + inside, "what": what, "used": used}


def damaged_episodes(source: Source, segments: Sequence[Segment], reason: str) -> Fault:
    """The entry of a dataset's episodes that are left out."""
    names = ", ".join(str(segment.episode) for segment in segments[:20]) + (", ..." if len(segments) > 20 else "")
    many = len(segments) > 1
    return fault(source, f"episode{'s' * many} {names} {'are' if many else 'is'} damaged: {reason}", "left out")


def unreadable(source: Source, reason: str) -> Fault:
    """The entry of a source that gives no frame at all."""
    return damaged_episodes(source, source.segments, reason) if source.segments else fault(source, reason, "no")


def describe(faults: Sequence[Fault]) -> str:
    """The first ones, for a message."""
    texts = [f"{entry['file']}: {entry['what']} ({_USED[entry['used']]})" for entry in faults[:3]]
    return "; ".join(texts) + ("; ..." if len(faults) > 3 else "")


_USED = {"the rest": "the rest is used", "left out": "left out", "no": "not used"}


def warn_of(faults: Sequence[Fault], sources: int) -> None:
    """One warning about everything that is wrong with some sources, if anything is."""
    if faults:
        logger.warning("%d of %d sources are damaged or give no pair: %s", len(faults), sources, describe(faults))


def require_pairs(report: dict[str, Any]) -> None:
    """Refuse a collection without a pair to train on.

    Args:
        report: of a :class:`~lara_adapter.data.index.VideoIndex`.

    Raises:
        DatasetError: no pair was found, and episodes are damaged; it names the first ones.
        LaraArgumentError: no pair was found; it names what is wrong with the first sources.
    """
    if report["pairs"]:
        return
    faults = report["faults"]
    kind = DatasetError if any(entry["used"] == "left out" for entry in faults) else LaraArgumentError
    raise kind(
        f"no usable video among {report['sources']} sources ({describe(faults) or 'nothing was found'}). "
        "Expected: video files, folders of pictures or datasets, with more frames than the gap"
    )
