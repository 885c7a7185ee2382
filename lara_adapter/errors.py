"""The errors of lara_adapter. A message names the argument, what was got, what is expected, and the fix.

All derive from :class:`LaraError`, so that `except LaraError` catches exactly what this library refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = [
    "AdapterFormatError",
    "AttachOrderError",
    "DatasetError",
    "FrameError",
    "HostNotInstalled",
    "HostOutputError",
    "HubError",
    "LaraArgumentError",
    "LaraError",
    "NonFiniteError",
    "OptimizerCoverageError",
    "PolicySourceError",
    "ServingError",
    "ServingTimeout",
    "TapDetached",
    "TapNeverFired",
    "TapNotFound",
    "TokenError",
]


class LaraError(Exception):
    """Base class of every error raised by lara_adapter."""


class LaraArgumentError(LaraError, ValueError):
    """An argument has a value outside what its docstring allows."""


class TapNotFound(LaraError, LookupError):
    """The DiT blocks, the layer among them, or the method that training calls cannot be found (or not without guessing)."""


class TapNeverFired(LaraError, RuntimeError):
    """A training forward ended and the tapped block was never called."""


class TapDetached(LaraError, RuntimeError):
    """The tapped hidden state carries no graph: LARA would train the projector and not the policy."""


class AttachOrderError(LaraError, RuntimeError):
    """`attach_lara` was called too early or too late in the life of the policy."""


class FrameError(LaraError, ValueError):
    """The frames of a batch are missing, or have the wrong shape, dtype, range or values."""


class DatasetError(LaraError, ValueError):
    """A dataset or a video cannot be read: missing, damaged, of an unknown version, or does not match its metadata."""


class TokenError(LaraError, ValueError):
    """The action token cannot be located in the tapped hidden state."""


class HostOutputError(LaraError, TypeError):
    """The policy's forward returned something into which no loss can be folded."""


class OptimizerCoverageError(LaraError, RuntimeError):
    """An optimizer lacks trainable LARA parameters: they would never be trained."""


class NonFiniteError(LaraError, FloatingPointError):
    """A LARA term is NaN or infinite; raised before it can reach a weight."""


class AdapterFormatError(LaraError, ValueError):
    """A saved adapter or latent action model is truncated, foreign, newer, or does not fit."""


class HostNotInstalled(LaraError, ImportError):
    """A policy's own library cannot be imported; the message says how to install it and which version was tested."""


class HubError(LaraError, OSError):
    """The Hugging Face Hub cannot be reached, does not have what was asked for, or does not accept what was sent."""


class PolicySourceError(LaraError, ValueError):
    """A policy (a folder, a Hub id, "module:callable") cannot be opened or built."""


class ServingError(LaraError, RuntimeError):
    """A policy server refused a request, failed at it or went away; or a message cannot be sent or read."""


class ServingTimeout(ServingError, TimeoutError):
    """A policy server did not answer in time."""


def name_flags(message: str, arguments: Iterable[str], prefix: str = "--", hyphens: bool = True) -> str:
    """A message, with the arguments that it names as somebody typed them: `batch_size=0` is `--batch-size=0`.

    Args:
        message: of an error.
        arguments: the ones that were flags.
        prefix: before each.
        hyphens: whether flags have hyphens where arguments have underscores.
    """
    names = "|".join(map(re.escape, arguments))
    named = rf"(?<![\w.\-(])({names})(?==)|^({names})(?=: )"
    return re.sub(named, lambda found: prefix + (found[0].replace("_", "-") if hyphens else found[0]), message)
