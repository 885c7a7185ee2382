"""`lara train-lam`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ..data.shard import parse_shard
from ..errors import LaraArgumentError
from ..lam.checkpoint import read_config
from ..lam.health.verdicts import GapHealth, Thresholds, judge
from ..lam.pretrain.run import pretrain_lam
from ..lam.pretrain.settings import PretrainSettings
from ..lam.pretrain.videos import scan_videos
from .arguments import takes
from .output import write

__all__ = ["train_lam"]


@takes(PretrainSettings, positional=("videos",), omit=("gap_frames", "gap_seconds"))
def train_lam(*, index_only: bool = False, shard: str | None = None, **arguments: Any) -> int:
    """Pre-train a latent action model on folders of unlabelled video, or continue the run in the output folder.

    Several processes: accelerate launch -m lara_adapter.cli train-lam ... Exit status: 0; 2 if something is wrong with
    the arguments, the videos or the output folder.

    Args:
        index_only: look at the videos, keep what was found in the output folder for the run, and train nothing.
        shard: with --index-only: the share of this machine, "i/n" with i from 0; no machine waits for another.
    """
    if shard is not None and not index_only:
        raise LaraArgumentError(f"shard={shard!r} is for --index-only; to train on several machines: accelerate launch")
    settings = PretrainSettings(**arguments)
    with _log_to_stderr():
        if index_only:
            done = scan_videos(settings, shard=None if shard is None else parse_shard(shard))
            write(
                f"{done.folder}: {done.sources} sources, {done.frames} frames decoded, {done.unusable} cannot be read"
            )
            return 0
        result = pretrain_lam(settings)
    text, health = "; nothing was held out to measure on", result.health
    if health is not None:
        text = f", reconstruction / copy {health.ratio:.3f} on {health.pairs} held-out pairs, {health.codes_used} codes"
        text += f", perplexity {health.perplexity:.1f}, mean direction {health.mean_direction:.2f}"
        codes = read_config(result.output).codebook_size
        for finding in judge([GapHealth(0, health, still=0.0, lost=0.0)], 0, codes, Thresholds()):
            text += f"\n{finding.name}: {finding.text}" if finding.state == "fail" else ""
    write(f"{result.output}: {result.steps} steps{text}")
    return 0


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """The log of this package on stderr, above the progress bar."""
    logger = logging.getLogger("lara_adapter")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        from tqdm.contrib.logging import logging_redirect_tqdm

        redirected: contextlib.AbstractContextManager[None] = logging_redirect_tqdm([logger])
    except ImportError:  # pretrain_lam refuses it, and says what to install
        redirected = contextlib.nullcontext()
    try:
        with redirected:
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
