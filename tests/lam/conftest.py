"""The one model that the tests of this folder train."""

from __future__ import annotations

import os

import pytest
import torch
from filelock import FileLock

from lara_adapter import LatentActionConfig, LatentActionModel


@pytest.fixture(scope="session")
def trained_tiny(tmp_path_factory) -> LatentActionModel:
    """A `tiny()` after 150 steps on moving squares, in eval mode; one xdist worker trains it, the others load it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # common to the workers
    with FileLock(folder / "trained_tiny.lock"):
        if not (folder / "trained_tiny").exists():
            _train().save_pretrained(folder / "trained_tiny")
    return LatentActionModel.from_pretrained(folder / "trained_tiny")


def _train() -> LatentActionModel:
    from test_model import moving_squares

    torch.manual_seed(0)
    lam = LatentActionModel(LatentActionConfig.tiny(vq_warmup_steps=60, vq_revive_every=25)).train()
    optimizer = torch.optim.AdamW(lam.parameters(), lr=1e-3)
    for step in range(150):
        optimizer.zero_grad()
        lam(*moving_squares(32, step)).loss.backward()
        optimizer.step()
    return lam
