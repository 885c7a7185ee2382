"""LARA inside LeRobot: frames from its datasets, its training command, checkpoints that stock LeRobot loads.

    python -m lara_adapter.integrations.lerobot.train --lara.lam=FOLDER <the flags of lerobot-train>

Tested with lerobot 0.6.1 (dataset format v3.0). lara_adapter declares no dependency on it: it runs in LeRobot's own
environment.
"""

try:
    import lerobot  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "lara_adapter.integrations.lerobot needs LeRobot, which is not installed here: pip install 'lerobot[training]' "
        "(tested with 0.6.1)"
    ) from error

from .checkpoints import stock_saves
from .dataset import LaraDataset

__all__ = ["LaraDataset", "stock_saves"]
