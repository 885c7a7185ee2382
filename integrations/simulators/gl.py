"""A search for an OpenGL library that renders without a display, for every simulator on MuJoCo.

A process renders with the library that `MUJOCO_GL` names at import, and a failed import cannot be repeated. So child
processes try them, and only *spawned* (never forked) children render.
"""

from __future__ import annotations

import os
import subprocess
import sys

from lara_adapter.errors import LaraError

__all__ = ["GLMissing", "find_gl", "settle_gl"]

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='.5'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().any()
renderer.close()
"""


class GLMissing(LaraError, RuntimeError):
    """No OpenGL library works on this machine; the message names packages to install."""


def _gl_works(name: str) -> bool:
    """Render one image with the back end `name` in a child process."""
    environment = {**os.environ, "MUJOCO_GL": name}
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


def find_gl() -> str:
    """Find an OpenGL back end that renders, and set `MUJOCO_GL` to it for this process and its later children.

    Tries the one in `MUJOCO_GL`, then EGL, then OSMesa. MuJoCo must not have been imported in this process.

    Returns:
        The name of the back end: "egl", "osmesa", or "cgl" on macOS.

    Raises:
        GLMissing: nothing works.
    """
    names = ["cgl"] if sys.platform == "darwin" else ["egl", "osmesa"]
    if first := os.environ.get("MUJOCO_GL"):
        names = [first, *(name for name in names if name != first)]
    for name in names:
        if _gl_works(name):
            os.environ["MUJOCO_GL"] = name
            return name
    raise GLMissing(
        "MuJoCo cannot render on this machine: neither EGL nor OSMesa works.\n"
        "Install one of them, on Debian or Ubuntu:\n"
        "    sudo apt-get update && sudo apt-get install -y libegl1 libopengl0 libgl1-mesa-dri\n"
        "    sudo apt-get install -y libosmesa6        # if EGL still does not work\n"
        "on Fedora: sudo dnf install mesa-libEGL mesa-dri-drivers"
    )


def settle_gl() -> None:
    """Call :func:`find_gl` unless this process has imported MuJoCo, which settled the back end."""
    if "mujoco" not in sys.modules:
        find_gl()
