"""LARA inside LeRobot: frames from its datasets, its training command, checkpoints that stock LeRobot loads.

    python -m lara_adapter.integrations.lerobot.train --lara.lam=FOLDER <the flags of lerobot-train>

Tested with lerobot 0.6.1 (dataset format v3.0). lara_adapter declares no dependency on it: it runs in LeRobot's own
environment. Without it, importing this package raises HostNotInstalled.
"""

from ..hosts import import_host, lazy

__all__ = ["LaraDataset", "stock_saves"]

import_host("lerobot")
__getattr__ = lazy(__name__, checkpoints="stock_saves", dataset="LaraDataset")
