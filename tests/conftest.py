"""Shared fixtures. The Hub is never asked."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from helpers.toys import DitPolicy, OwnLam, make_batch

# The models here are tiny: on a busy machine a second thread costs fifty times what it saves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def policy() -> DitPolicy:
    return DitPolicy().train()


@pytest.fixture
def lam() -> OwnLam:
    return OwnLam()


@pytest.fixture
def batch() -> dict:
    return make_batch()


@pytest.fixture(scope="session")
def gl() -> str:
    pytest.importorskip("metaworld", reason="Meta-World is not installed (extra demo)")
    from examples.metaworld_sim import GLMissing, find_gl

    before = os.environ.get("MUJOCO_GL")
    try:
        return find_gl(install=False)
    except GLMissing as problem:
        pytest.skip(f"no OpenGL: {str(problem).splitlines()[0]}")
    finally:
        os.environ.pop("MUJOCO_GL", None)
        if before is not None:
            os.environ["MUJOCO_GL"] = before
