"""No test depends on the folder that it is started in, or on what another program left there."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))  # not tmp_path, which a test may replace as a whole
