from __future__ import annotations

import os

import pytest


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
