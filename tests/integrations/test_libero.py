"""LIBERO's adapter without LIBERO: settings, and the contract with its interface. The real one: test_libero_real.py."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from lara_adapter.integrations.simulators import open_simulator
from lara_adapter.integrations.simulators.libero import STEPS

from lara_adapter import HostNotInstalled, LaraArgumentError


def test_the_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(HostNotInstalled, match=r'pip install "lara-adapter\[libero\]"'):
        open_simulator("libero")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "libero_9"}, "suite='libero_9', but one of libero_spatial, libero_object, libero_goal, libero_10"),
        ({"gripper": "open"}, "gripper='open', but one of rlds, raw"),
        ({"quality": "best"}, "quality='best', but one of libero, fast"),
        ({"privileged": "some"}, "privileged='some', but one of True, False"),
        ({"image_size": 8}, "image_size=8"),
        ({"colour": "red"}, "unexpected keyword"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(LaraArgumentError, match=message):
        open_simulator("libero", **settings)


class Env:
    """LIBERO's ControlEnv, as far as it is used."""

    def __init__(self, **settings):
        self.calls, self.settings, self.env = [], settings, self
        self.robots = [types.SimpleNamespace(gripper=types.SimpleNamespace(dof=1, current_action=np.ones(1)))]

    def reset(self):
        self.calls.append(("reset", float(np.random.uniform())))

    def set_init_state(self, state):
        self.calls.append(("start", state, self.robots[0].gripper.current_action.tolist()))
        return self.look()

    def look(self):
        return {
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([0, 0, np.sin(0.25), np.cos(0.25)]),  # half a radian about z
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def step(self, action):
        self.calls.append(("step", np.asarray(action).tolist()))
        return self.look(), 0.0, len(self.calls) > 13, {}

    def close(self):
        self.calls.append(("close",))


class Suite:
    def get_num_tasks(self):
        return 2

    def get_task_names(self):
        return ["task_0", "task_1"]

    def get_task(self, index):
        return types.SimpleNamespace(
            name=f"task_{index}", language=f"do {index}", problem_folder="folder", bddl_file=f"{index}.bddl"
        )

    def get_task_init_states(self, index):
        return ["first", "second", "third"]


class Cameras:
    """Counts what is rendered."""

    def __init__(self, env, size, fast):
        self.data, self.rendered = None, []

    def render(self, camera):
        self.rendered.append(camera)
        return np.zeros((4, 4, 3), np.uint8)

    def close(self):
        self.rendered.append("closed")


@pytest.fixture
def environment(monkeypatch):
    names = ("libero", "libero.libero", "libero.libero.envs", "libero.libero.envs.env_wrapper")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    modules["libero.libero"].get_libero_path = lambda name: f"/{name}"
    modules["libero.libero.envs.env_wrapper"].ControlEnv = Env
    adapter = "lara_adapter.integrations.simulators.libero"
    monkeypatch.setattr(f"{adapter}._suite", lambda name: Suite())
    monkeypatch.setattr(f"{adapter}.Views", Cameras)
    monkeypatch.setattr(f"{adapter}.settle_gl", lambda: None)
    return lambda **settings: open_simulator("libero", **settings).open("task_1")


def test_an_episode_begins_at_a_stored_start_and_forgets_the_one_before(environment):
    task = environment()
    calls = task.simulator.calls
    task.reset(4)
    before = np.random.get_state()[1].copy()
    task.reset(4)
    assert np.array_equal(np.random.get_state()[1], before)  # the program's own random numbers
    resets = [call for call in calls if call[0] == "reset"]
    assert resets[0] == resets[1]
    assert [call for call in calls if call[0] == "start"] == [("start", "second", [0.0])] * 2
    assert calls[-10:] == [("step", [0, 0, 0, 0, 0, 0, -1])] * 10
    assert task.max_steps == STEPS["libero_spatial"]
    with pytest.raises(LaraArgumentError, match=r"task='fly', but libero_spatial has \['task_0', 'task_1'\]"):
        open_simulator("libero").open("fly")


def test_only_what_is_looked_at_is_rendered(environment):
    task = environment()
    task.reset(0)
    assert task._views.rendered == []
    seen = task.observe(["wrist_image"])
    assert (list(seen.views), task._views.rendered) == (["wrist_image"], ["robot0_eye_in_hand"])
    assert task.observe([]).views == {}
    assert list(task.observe().views) == ["image", "wrist_image"]
    task.close()
    assert task._views.rendered[-1] == "closed"
    assert seen.instruction == "do 1"
    assert seen.states["state"] == pytest.approx([0.1, 0.2, 0.3, 0, 0, 0.5, 0.04, -0.04], abs=1e-6)
    assert seen.states["yaw"] == pytest.approx([0.5])


def test_both_meanings_of_the_gripper(environment):
    task = environment()
    assert not task.step(np.float32([1, 2, 3, 4, 5, 6, 0.9]))
    assert task.simulator.calls[-1] == ("step", [1, 2, 3, 4, 5, 6, -1])  # 1 opens, which is -1 there
    task.step(np.float32([0] * 7))
    assert task.simulator.calls[-1][1][-1] == 1
    raw = environment(gripper="raw")
    raw.step(np.float32([0] * 6 + [0.25]))
    assert raw.simulator.calls[-1][1][-1] == 0.25


def test_vertices_of_each_shape():
    mujoco = pytest.importorskip("mujoco")
    from lara_adapter.integrations.simulators.libero_views import vertices

    model = mujoco.MjModel.from_xml_string(
        """<mujoco><asset><mesh name="m" vertex="0 0 0  1 0 0  0 1 0  0 0 1"/></asset><worldbody>
        <geom type="box" size=".1 .2 .3"/><geom type="sphere" size=".5"/><geom type="cylinder" size=".1 .4"/>
        <geom type="capsule" size=".1 .4"/><geom type="mesh" mesh="m"/></worldbody></mujoco>"""
    )
    ends = ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5], [0.1, 0.1, 0.4], [0.1, 0.1, 0.5])
    for geom, end in enumerate(ends):
        assert np.abs(vertices(mujoco, model, geom)).max(0) == pytest.approx(end)
    assert vertices(mujoco, model, 4).shape == (4, 3)
