"""Adapters over HTTP with the Hub's client that LeRobot brings (1.x); the same scenarios as in tests/hub."""

import pytest

pytest.importorskip("lerobot")

from hub.fixtures import _home, _server, acting_as, client, hub, offline  # noqa: F401
from hub.test_pinned import *  # noqa: F403
from hub.test_push_and_load import *  # noqa: F403
from hub.test_what_goes_wrong import *  # noqa: F403
