"""The parts of examples/libero that need no simulator: geometry, the hand on a toy scene, and resuming a recording."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from examples.libero.expert import Expert, ServedExpert
from examples.libero.grasps import choose, free_height, touched, turn
from examples.libero.hand import CLOSED, OPEN, STEP
from examples.libero.scene import Scene, dense, middle

PALM = 0.05  # within the hand, above the point between the pads


def box(centre, half) -> np.ndarray:
    """Eight corners in the simulator's order."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    return signs * half + centre


def test_a_box_gets_points_on_its_surface_and_a_mesh_stays():
    corners = box([0.1, 0.2, 0.3], [0.05, 0.03, 0.01])
    points = dense(np.concatenate([[[9, 9, 9]], corners, [[8, 8, 8], [7, 7, 7]]]), spacing=0.01)
    inside = points[np.abs(points).max(1) < 2] - [0.1, 0.2, 0.3]
    assert len(inside) > 100
    assert np.isclose(np.abs(inside) / [0.05, 0.03, 0.01], 1).any(1).all()
    assert (np.abs(inside) <= np.array([0.05, 0.03, 0.01]) + 1e-9).all()
    mesh = np.random.default_rng(0).normal(size=(20, 3))
    assert np.array_equal(dense(mesh), mesh)


@pytest.mark.parametrize("angle", [-3.0, -1.5, 0.2, 1.4, 2.9])
def test_the_fingers_are_alike_so_a_turn_is_at_most_a_quarter(angle):
    for goal in np.linspace(-6, 6, 31):
        way = turn(goal, angle)
        assert -np.pi / 2 <= way < np.pi / 2
        assert np.isclose(np.sin(angle + way - goal), 0, atol=1e-9)


def test_what_is_narrow_is_taken_across_its_narrow_side():
    points = box([0.1, 0, 0.05], [0.1, 0.02, 0.05])
    grasp = choose(points, [], present=0.0)
    assert abs(turn(np.pi / 2, grasp.angle)) < 0.1
    assert np.allclose(grasp.place[:2], [0.1, 0], atol=0.02)
    assert 0 < grasp.place[2] < 0.1


def test_what_is_wide_is_taken_at_its_rim():
    ring = np.array([[np.cos(a), np.sin(a), z] for a in np.arange(0, 6.28, 0.2) for z in (0, 0.05)]) * [0.06, 0.06, 1]
    grasp = choose(ring, [], present=0.0)
    assert np.isclose(np.linalg.norm(grasp.place[:2]), 0.054, atol=0.003)
    assert grasp.cost < 0.1


def test_a_neighbour_moves_the_grasp_away_from_it():
    points = box([0, 0, 0.01], [0.04, 0.02, 0.01])
    can = dense(box([0.03, 0.09, 0.05], [0.02, 0.03, 0.05]))
    grasp = choose(points, [can], present=np.pi / 2)
    assert grasp.cost < 1
    assert touched(can, grasp.place, grasp.angle) == 0
    assert touched(can, np.array([0, 0, 0.01]), np.pi / 2) > 0


def test_a_grasp_that_failed_is_not_repeated():
    ring = np.array([[np.cos(a), np.sin(a), z] for a in np.arange(0, 6.28, 0.1) for z in (0, 0.05)]) * [0.06, 0.06, 1]
    first = choose(ring, [], present=0.0)
    assert np.cos(choose(ring, [], 0.0, [first.angle]).angle - first.angle) <= 0.9


def test_the_hand_goes_over_what_is_in_the_way():
    wall = dense(box([0.2, 0, 0.15], [0.01, 0.3, 0.15]))
    start, end = np.array([0.0, 0.0]), np.array([0.4, 0.0])
    assert free_height([wall], start, end, 0.0, 0.1) > 0.3
    assert free_height([wall], start, np.array([-0.4, 0.0]), 0.0, 0.1) == pytest.approx(0.1)
    hanging = free_height([wall], start, end, 0.0, 0.1, held=np.array([0, 0, -0.1]), radius=0.03)
    assert hanging > 0.4


class Toy:
    """A table with a box and a plate; the hand goes where it is told, and takes what is between closed fingers."""

    def __init__(self) -> None:
        self.hand, self.angle, self.held = np.array([-0.2, 0.0, 0.3]), np.pi / 2, False
        self.box, self.plate = np.array([0.05, -0.1, 0.03]), np.array([0.05, 0.2, 0.005])
        self.closed = 0

    def states(self) -> dict[str, np.ndarray]:
        u = 0.04 * np.array([np.cos(self.angle), np.sin(self.angle), 0])
        points = {"box": box(self.box, [0.03, 0.02, 0.03]), "plate": box(self.plate, [0.06, 0.06, 0.005])}
        points |= {"target": points["box"], "goal": points["plate"]}
        state = np.concatenate([self.hand, np.zeros(5)])
        flat = {f"{name}.points": value.ravel() for name, value in points.items()}
        return {"state": state, "fingers": np.concatenate([self.hand + u, self.hand - u]), **flat}

    def step(self, action: np.ndarray) -> bool:
        move = 0.25 * STEP * action[:3]
        self.closed = max(0, self.closed + 1) if action[-1] == CLOSED else 0
        if self.closed == 8:
            self.held = np.linalg.norm(self.hand - self.box) < 0.03
        elif action[-1] == OPEN:
            if self.held:
                self.box[2] = 0.03 + 0.01 * (np.abs(self.box[:2] - self.plate[:2]).max() < 0.06)
            self.held = False
        self.hand, self.angle = self.hand + move, self.angle + 0.2 * action[5]
        self.box = self.box + move if self.held else self.box
        return not self.held and self.box[2] > 0.035


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_expert_solves_a_toy_task(noise):
    toy, expert = Toy(), Expert(noise, seed=3)
    for step in range(250):  # noqa: B007
        action = expert.act(Scene(toy.states()))
        assert action.shape == (7,)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        if toy.step(action):
            break
    assert step < 240
    assert np.linalg.norm(toy.box[:2] - toy.plate[:2]) < 0.03


def test_the_expert_is_served_with_the_gripper_of_the_datasets():
    policy, toy = ServedExpert(), Toy()
    config = policy.get_modality_config()
    assert "state" not in config
    assert config["video"].modality_keys == []
    observation = {"state": {name: value[None, None] for name, value in toy.states().items()}}
    policy.reset({"seed": 3})
    action = policy.get_action(observation)["action"]
    assert action.shape == (1, 1, 7)
    assert action[0, 0, -1] == 1  # open
    with pytest.raises(ValueError, match="privileged=True"):
        policy.get_action({"state": {"state": np.zeros((1, 1, 8))}})


def test_the_scene_leaves_the_target_out_of_the_others():
    scene = Scene(Toy().states())
    assert scene.names == ["box", "plate"]
    (plate,) = scene.others("target")
    assert np.allclose(middle(plate), [0.05, 0.2])
    assert len(scene.others("box")) == 1


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed (extra video)")
def test_a_recording_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("pyarrow")
    from helpers.libero_episodes import toy_episode

    from examples.libero.dataset import Recording
    from examples.libero.record import fill

    asked: list[int] = []

    def record(numbers):
        for number in numbers:
            asked.append(number)
            if number == 4 and 4 not in asked[:-1]:
                raise KeyboardInterrupt
            yield None if number == 1 else toy_episode(length=5 + number)

    def run() -> Recording:
        with Recording(tmp_path / "data", "v3.0", 32, True, {"suite": "toy"}) as recording:
            for _ in fill(recording, "a task", 4, record):
                pass
        return recording

    with pytest.raises(KeyboardInterrupt):
        run()
    assert run().tried("a task") == (4, 1)
    assert asked == [0, 1, 2, 3, 4, 4]
    assert [entry["facts"]["start"] for entry in run().journal["episodes"]] == [0, 2, 3, 4]
    with pytest.raises(ValueError, match="other settings"):
        Recording(tmp_path / "data", "v3.0", 32, True, {"suite": "another"})
    with pytest.raises(ValueError, match="not a recording"):
        Recording(tmp_path, "v3.0", 32, True, {})


def test_an_expert_that_always_fails_is_an_error(tmp_path):
    from examples.libero.dataset import Recording
    from examples.libero.record import fill

    recording = Recording(tmp_path / "data", "v3.0", 32, True, {})
    with pytest.raises(RuntimeError, match="the expert failed"):
        list(fill(recording, "a task", 2, lambda numbers: iter([None for _ in numbers])))
