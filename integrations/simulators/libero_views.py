"""A LIBERO scene: its cameras, rendered only when somebody looks, and its geometry, for scripted experts."""

from __future__ import annotations

import atexit
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "Views"]

_MOVING = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat",
    "light_xpos", "light_xdir",
)  # fmt: skip


class Views:
    """Renders what LIBERO's own cameras would have rendered in the last step, bit for bit, but only when asked.

    LIBERO samples its observations during a step, before its end, and renders both cameras each time. Here the sample is a
    copy of the places of all things.

    Attributes:
        data: the sampled scene, a MuJoCo data object without dynamics.
    """

    def __init__(self, env: Any, size: int, fast: bool) -> None:
        """Sample along with a robosuite environment; `size` is the side of the images in pixels.

        `fast` leaves out multi-sampling, shadows and reflections.
        """
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        self._mujoco, self._size, self._fast = mujoco, size, fast
        self._model, self._source = env.sim.model._model, env.sim.data._data
        self.data = mujoco.MjData(self._model)
        self._images: dict[str, NDArray[np.uint8]] = {}
        self._renderer: Any = None
        if fast:  # read when a renderer is made
            self._model.vis.quality.offsamples = self._model.vis.quality.shadowsize = 0
        frame = self._model.vis.global_
        frame.offwidth, frame.offheight = max(size, frame.offwidth), max(size, frame.offheight)

        @sensor(modality="scene")
        def sample(_: Any) -> NDArray[np.float64]:
            for name in _MOVING:
                getattr(self.data, name)[:] = getattr(self._source, name)
            self._images.clear()
            return np.zeros(1)

        # inactive: sampled together with LIBERO's own observations, but not among them
        env.add_observable(Observable("lara_scene", sample, sampling_rate=env.control_freq, active=False))

    def render(self, camera: str) -> NDArray[np.uint8]:
        """The image of a camera: uint8 [size, size, 3], rotated by 180 degrees from LIBERO's, as policies get it."""
        if camera not in self._images:
            if self._renderer is None:
                self._renderer = self._mujoco.Renderer(self._model, self._size, self._size)
                # before the GL library is unloaded, else it prints errors at exit
                atexit.register(self._renderer.close)
            options = self._mujoco.MjvOption()
            options.geomgroup[0] = 0  # collision shapes, which robosuite hides
            self._renderer.update_scene(self.data, camera, options)
            if self._fast:  # update_scene sets them again
                flags = self._mujoco.mjtRndFlag
                self._renderer.scene.flags[flags.mjRND_SHADOW] = 0
                self._renderer.scene.flags[flags.mjRND_REFLECTION] = 0
            self._images[camera] = np.ascontiguousarray(self._renderer.render()[:, ::-1])
        return self._images[camera]

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            atexit.unregister(self._renderer.close)
            self._renderer.close()
            self._renderer = None


class Geometry:
    """Where things are, for scripted experts: a policy that learns from images must not see it."""

    def __init__(self, env: Any, data: Any) -> None:
        """Of a LIBERO environment (the inner one); `data` is the MuJoCo data to read from."""
        import mujoco

        self._data, model = data, env.sim.model._model
        self._fingers = [model.body(f"gripper0_{side}finger").id for side in ("left", "right")]
        self._bodies: dict[str, int] = {}
        self._shapes: dict[str, list[tuple[int, NDArray[np.float64]]]] = {}  # geom, its vertices in its own frame
        for thing in [*env.objects, *env.fixtures]:
            root = self._bodies[thing.name] = model.body(thing.root_body).id
            tree = {root}
            for body in range(root + 1, model.nbody):  # parents come before their children
                if model.body_parentid[body] in tree:
                    tree.add(body)
            collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
            own = [g for g in range(model.ngeom) if model.geom_bodyid[g] in tree and collides[g]]
            self._shapes[thing.name] = [(g, vertices(mujoco, model, g)) for g in own]
        named = [next((name for name in self._bodies if part.startswith(name)), None) for part in env.obj_of_interest]
        found = [name for name in named if name is not None]
        self._roles = {"target": found[0], "goal": found[-1]} if found else {}

    def states(self) -> dict[str, NDArray[np.float32]]:
        """Poses and vertices as :class:`~.libero.Libero` describes them."""
        data = self._data
        found = {"fingers": np.concatenate([data.xpos[body] for body in self._fingers])}
        for name, body in self._bodies.items():
            found[f"{name}.pose"] = np.concatenate([data.xpos[body], np.roll(data.xquat[body], -1)])
            parts = [
                own @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom] for geom, own in self._shapes[name]
            ]
            found[f"{name}.points"] = np.concatenate(parts).ravel() if parts else np.zeros(0)
        for role, name in self._roles.items():
            found |= {f"{role}.{kind}": found[f"{name}.{kind}"] for kind in ("pose", "points")}
        return {name: value.astype(np.float32) for name, value in found.items()}


def vertices(mujoco: Any, model: Any, geom: int) -> NDArray[np.float64]:
    """Vertices [N, 3] of a geom in its own frame, in metres; of round ones, of a prism or box around them."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        return np.array(model.mesh_vert[first : first + count], np.float64)
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return signs * size[0]
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ring = size[0] * np.stack([np.cos(angles), np.sin(angles)], 1)
        end = size[1] + (size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0)
        return np.concatenate([np.column_stack([ring, np.full(24, z)]) for z in (-end, end)])
    return signs * size
