"""`lara train-lam`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ..lam.pretrain.run import pretrain_lam
from ..lam.pretrain.settings import PretrainSettings
from .arguments import takes
from .output import write

__all__ = ["train_lam"]


@takes(PretrainSettings, positional=("videos",), omit=("gap_frames", "gap_seconds"))
def train_lam(**arguments: Any) -> int:
    """Pre-train a latent action model on folders of unlabelled video, or continue the run in the output folder.

    Several processes: accelerate launch -m lara_adapter.cli train-lam ... Exit status: 0; 2 if something is wrong with
    the arguments, the videos or the output folder.
    """
    with _log_to_stderr():
        result = pretrain_lam(PretrainSettings(**arguments))
    text, health = "; nothing was held out to measure on", result.health
    if health is not None:
        text = f", reconstruction / copy {health.ratio:.3f} on {health.pairs} held-out pairs, {health.codes_used} codes"
        text += f", perplexity {health.perplexity:.1f}"
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
