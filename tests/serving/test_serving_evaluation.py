"""Chunks, layouts, episodes, resuming and the report, in a simulator small enough to check every number."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

pytest.importorskip("msgpack")
pytest.importorskip("zmq")

from helpers.lines import Lines
from helpers.serving_policies import serving
from lara_adapter.integrations.simulators import open_simulator

from lara_adapter import HostNotInstalled, LaraArgumentError, ServingError
from lara_adapter.evaluation import ChunkExecutor, Observation, Rollouts, wilson_interval
from lara_adapter.evaluation.environment import Layout
from lara_adapter.evaluation.episodes import Episode, WorkerDied, split
from lara_adapter.evaluation.report import format_report
from lara_adapter.evaluation.rollout import sampling_seed
from lara_adapter.serving import ModalityConfig, PolicyClient

# ---------------------------------------------------------------------- chunks


def chunk(first: int, length: int = 4) -> np.ndarray:
    """Actions [length, 2] that tell the step they were predicted at and the step they are for."""
    return np.stack([np.float32([first, first + i]) for i in range(length)])


def play(executor: ChunkExecutor, steps: int) -> tuple[list[int], np.ndarray]:
    asked, done = [], []
    for step in range(steps):
        if executor.wants_chunk:
            asked.append(step)
            executor.add(chunk(step))
        done.append(executor.next())
    return asked, np.stack(done)


@pytest.mark.parametrize(
    ("execute", "asked"), [(None, [0, 4, 8]), (3, [0, 3, 6, 9]), (1, list(range(10))), (9, [0, 4, 8])]
)
def test_k_of_a_chunk_are_done(execute, asked):
    executor = ChunkExecutor(execute)
    for _ in range(2):
        executor.reset()
        questions, done = play(executor, 10)
        assert questions == asked
        assert done[:, 1].tolist() == list(range(10))  # always the action that was meant for this step
        assert done[:, 0].tolist() == [max(a for a in asked if a <= step) for step in range(10)]  # of the newest chunk


def test_the_temporal_ensemble_is_acts():
    """Zhao et al., section IV-B: w_i = exp(-m i), w_0 for the oldest action."""
    m = 0.5
    questions, done = play(ChunkExecutor(ensemble=m), 6)
    assert questions == list(range(6))
    for step in range(6):
        sources = [source for source in range(step + 1) if step < source + 4]  # the oldest first
        weights = np.exp(-m * np.arange(len(sources)))
        assert done[step, 0] == pytest.approx((weights * sources).sum() / weights.sum(), rel=1e-6)
        assert done[step, 1] == pytest.approx(step)


def test_an_ensemble_that_is_asked_every_second_step():
    questions, done = play(ChunkExecutor(execute=2, ensemble=0.0), 6)
    assert questions == [0, 2, 4]
    assert done[:, 0].tolist() == [0, 0, 1, 1, 3, 3]  # means of the two chunks that reach


def test_chunks_that_cannot_be():
    for arguments in ({"execute": 0}, {"ensemble": -1.0}, {"ensemble": float("nan")}):
        with pytest.raises(LaraArgumentError):
            ChunkExecutor(**arguments)
    with pytest.raises(LaraArgumentError, match=r"\[H, A\] is expected"):
        ChunkExecutor().add(np.zeros(3, np.float32))
    with pytest.raises(LaraArgumentError, match="no chunk"):
        ChunkExecutor().next()


# ---------------------------------------------------------------------- layout

SEEN = Observation(
    {"top": np.full((4, 4, 3), 1, np.uint8), "hand": np.full((2, 2, 3), 2, np.uint8)},
    {"joints": np.float32([1, 2]), "gripper": np.float32([3])},
    "push",
)


def test_without_a_configuration_the_policy_gets_everything():
    layout = Layout({}, SEEN)
    request = layout.request([SEEN])
    assert request["video"]["top"].shape == (1, 1, 4, 4, 3)
    assert request["video"]["hand"].shape == (1, 1, 2, 2, 3)
    assert request["state"]["joints"].tolist() == [[[1, 2]]]
    assert request["language"] == {"task": [["push"]]}


def test_a_policy_that_wants_nothing_of_a_kind():
    nothing = {kind: ModalityConfig([], []) for kind in ("state", "language")}
    request = Layout({"video": ModalityConfig([0], ["top"]), **nothing}, SEEN).request([SEEN])
    assert list(request["video"]) == ["top"]
    assert request["state"] == {}
    assert request["language"] == {"task": [["push"]]}


def test_names_history_and_order_are_the_policys():
    config = {
        "video": ModalityConfig([-2, 0], ["front"]),
        "state": ModalityConfig([0], ["gripper"]),
        "action": ModalityConfig([0, 1], ["b", "a"]),
        "language": ModalityConfig([0], ["annotation.task"]),
    }
    layout = Layout(config, SEEN, {"front": "top"})
    assert layout.history == 3
    frames = [
        Observation({"top": np.full((1, 1, 3), i, np.uint8)}, {"gripper": np.float32([i])}, "x") for i in range(4)
    ]
    for past, expected in ((frames[:1], [0, 0]), (frames[:2], [0, 1]), (frames[1:4], [1, 3])):
        request = layout.request(past)
        assert list(request["video"]) == ["front"]
        assert request["video"]["front"][0, :, 0, 0, 0].tolist() == expected
        assert request["state"] == {"gripper": np.float32([[[expected[-1]]]])}
        assert request["language"] == {"annotation.task": [["x"]]}
    action = {"a": np.ones((1, 2, 1), np.float32), "b": np.zeros((1, 2, 2), np.float32)}
    assert layout.chunk(action, 3).tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"a": np.zeros((1, 2, 3))}, r"has \['a'\], but \['b', 'a'\] is expected"),
        ({"a": np.zeros((1, 2, 1)), "b": np.zeros((1, 3, 1))}, "do not fit together"),
        ({"a": np.zeros((1, 2, 1)), "b": np.zeros((1, 2, 1))}, r"shape \[2, 2\], but \[1, H, 3\] is expected"),
        (np.zeros((2, 2, 3)), r"shape \[2, 2, 3\]"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
    ],
)
def test_actions_that_do_not_fit(action, said):
    with pytest.raises(ServingError, match=said):
        Layout({"action": ModalityConfig([0], ["b", "a"])}, SEEN).chunk(action, 3)


def test_observations_that_the_simulator_does_not_have():
    with pytest.raises(LaraArgumentError, match=r"no \['front'\]; it has \['hand', 'top'\].*--rename"):
        Layout({"video": ModalityConfig([0], ["front"])}, SEEN)
    with pytest.raises(LaraArgumentError, match="has no input named"):
        Layout({}, SEEN, {"front": "top"})
    with pytest.raises(LaraArgumentError, match="future"):
        Layout({"video": ModalityConfig([0, 1], ["top"])}, SEEN)


# ---------------------------------------------------------------------- episodes


class Mover:
    """Moves by 0.1 and the noise of its seed, four steps at a time; dies at a certain request."""

    def __init__(self, dies_at: int | None = None):
        self.requests, self.dies_at = 0, dies_at

    def get_modality_config(self):
        return {"action": ModalityConfig([0, 1, 2, 3], ["move"]), "language": ModalityConfig([0], ["task"])}

    def get_action(self, observation, options=None):
        self.requests += 1
        if self.requests == self.dies_at:
            raise RuntimeError("out of memory")
        assert observation["language"]["task"] == [["go to 1"]]
        noise = np.random.default_rng(options["seed"]).uniform(0, 0.01, (1, 4, 1))
        return {"move": np.float32(0.1 + noise)}, {}


def roll(policy, folder, world=None, **settings):
    """Two tasks of three episodes; the report, the simulator."""
    world = world or Lines()
    run = {name: settings.pop(name) for name in ("videos", "workers") if name in settings}
    with serving(policy, description="mover") as server, PolicyClient(port=server.port) as client:
        return Rollouts(client, world, folder, **settings).run(world.tasks(), [4, 5, 6], **run), world


def test_episodes_are_counted_and_the_same_seed_is_the_same_episode(tmp_path):
    report, world = roll(Mover(), tmp_path / "a", execute=2)
    for task in ("short", "long"):
        row = report["tasks"][task]
        assert [run["seed"] for run in row["runs"]] == [4, 5, 6]
        assert [run["success"] for run in row["runs"]] == [True, False, True]
        assert (row["successes"], row["episodes"]) == (2, 3)
        assert row["interval_95"] == pytest.approx(wilson_interval(2, 3))
        assert row["runs"][1]["steps"] == 30
        assert row["runs"][1]["requests"] == 15
    assert report["all"]["successes"] == 4
    assert report["all"]["mean_steps_when_solved"] == pytest.approx(np.mean([r["steps"] for r in _solved(report)]))
    assert report["settings"]["policy"] == "mover"
    assert report["settings"]["execute"] == 2
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == report
    assert world.closed == 2
    # looked at only when the policy is asked, and once to match the names
    assert world.looks == sum(run["requests"] for task in report["tasks"].values() for run in task["runs"]) + 2
    _, again = roll(Mover(), tmp_path / "b", execute=2)
    assert again.actions == world.actions
    assert "2/3" in format_report(report)
    assert "all" in format_report(report)


def _solved(report):
    return [run for task in report["tasks"].values() for run in task["runs"] if run["success"]]


def test_what_was_finished_is_not_run_again_after_the_server_failed(tmp_path):
    whole, world = roll(Mover(), tmp_path / "whole")
    with pytest.raises(ServingError, match="RuntimeError: out of memory"):
        roll(Mover(dies_at=20), tmp_path / "run")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "episodes").iterdir()}
    assert 1 <= len(finished) < 6
    report, rest = roll(Mover(), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert 0 < rest.steps < world.steps
    drop = lambda runs: [{k: v for k, v in run.items() if "second" not in k} for run in runs]  # noqa: E731
    for task in ("short", "long"):
        assert drop(report["tasks"][task]["runs"]) == drop(whole["tasks"][task]["runs"])
    policy = Mover()
    again, nothing = roll(policy, tmp_path / "run")
    assert (again, policy.requests, nothing.steps) == (report, 0, 0)


def test_episodes_of_other_settings_are_not_mixed(tmp_path):
    roll(Mover(), tmp_path, execute=2)
    with pytest.raises(LaraArgumentError, match="execute: 2 then, None now"):
        roll(Mover(), tmp_path)


def test_a_run_that_finished_no_episode_does_not_bind_the_next_one(tmp_path):
    (tmp_path / "settings.json").write_text(
        '{"execute": 3}'
    )  # all that an evaluation leaves whose server failed at once
    report, _ = roll(Mover(), tmp_path, execute=2)
    assert report["settings"]["execute"] == 2


def test_arguments_that_cannot_be(tmp_path):
    with serving(Mover()) as server, PolicyClient(port=server.port) as client:
        with pytest.raises(LaraArgumentError, match="max_steps=0"):
            Rollouts(client, Lines(), tmp_path, max_steps=0)
        rollouts = Rollouts(client, Lines(), tmp_path)
        with pytest.raises(LaraArgumentError, match="workers=0"):
            rollouts.run(["long"], [0], workers=0)
        with pytest.raises(LaraArgumentError, match=r"tasks: fly, but lines has 2: short, long; all"):
            rollouts.run(["fly"], [0])


def test_episodes_are_filmed(tmp_path):
    av = pytest.importorskip("av")
    roll(Mover(), tmp_path, videos=2)
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == [
        "long-4.mp4", "long-5.mp4", "short-4.mp4", "short-5.mp4",
    ]  # fmt: skip
    with av.open(str(tmp_path / "videos" / "short-5.mp4")) as container:
        brightness = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == pytest.approx(20)
    assert len(brightness) == 16  # each second of 30 steps, and the end
    assert np.all(np.diff(brightness) > 5)


def test_episodes_that_were_finished_without_a_film_are_not_run_again_for_it(tmp_path, caplog):
    pytest.importorskip("av")
    roll(Mover(), tmp_path)
    policy = Mover()
    roll(policy, tmp_path, videos=1)
    assert policy.requests == 0
    assert "2 of the episodes to film were finished without a film" in caplog.text
    caplog.clear()
    roll(Mover(), tmp_path / "fresh", videos=1)
    roll(Mover(), tmp_path / "fresh", videos=1)
    assert caplog.text == ""


@pytest.mark.slow
def test_the_report_of_several_processes_has_the_same_bytes(tmp_path):
    pytest.importorskip("av")
    report, _ = roll(Mover(), tmp_path / "one", videos=1)
    assert roll(Mover(), tmp_path / "two", videos=1, workers=2)[0] == report
    for name in ("report.json", "videos/short-4.mp4", "videos/long-4.mp4"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "seconds" not in report["tasks"]["long"]["runs"][0]
    assert "seconds" in json.loads((tmp_path / "two" / "episodes" / "long-4.json").read_text())


@pytest.mark.slow
def test_what_several_processes_have_finished_is_not_run_again(tmp_path):
    whole, _ = roll(Mover(), tmp_path / "whole")
    with pytest.raises(ServingError, match="RuntimeError: out of memory"):
        roll(Mover(dies_at=20), tmp_path / "run", workers=2)
    with pytest.raises(WorkerDied, match="one of 2 workers was killed"):
        roll(Mover(), tmp_path / "run", Lines(dies_at=6), workers=2)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "episodes").iterdir()}
    assert 1 <= len(finished) < 6
    assert roll(Mover(), tmp_path / "run", workers=2)[0] == whole
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


class Remembering(Mover):
    """A policy that counts the requests of its episode."""

    def reset(self, options=None):
        self.requests = 0


def test_a_policy_that_may_keep_an_episodes_state_gets_one_worker(tmp_path):
    with pytest.raises(LaraArgumentError, match=r"workers=2: mover has reset\(\), so it may keep.*stateful = False"):
        roll(Remembering(), tmp_path / "two", workers=2)
    assert roll(Remembering(), tmp_path / "one")[0]["all"]["episodes"] == 6


@pytest.mark.slow
def test_one_that_says_that_it_keeps_none_gets_several(tmp_path):
    class Stateless(Remembering):
        stateful = False

    report, _ = roll(Stateless(), tmp_path / "two", workers=2)
    assert report == roll(Mover(), tmp_path / "one")[0]


def test_tasks_are_cut_only_when_there_are_fewer_than_workers():
    todo = [Episode(task, seed, False) for task in ("a", "b") for seed in range(3)]
    shape = lambda workers: [(part[0].task, [e.seed for e in part]) for part in split(todo, workers)]  # noqa: E731
    assert shape(2) == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    assert shape(3) == [("a", [0, 2]), ("a", [1]), ("b", [0, 2]), ("b", [1])]
    assert len(shape(50)) == 6


def test_seeds_of_requests_differ_and_stay():
    seeds = {sampling_seed(seed, step) for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sampling_seed(3, 7) == sampling_seed(3, 7)


# ---------------------------------------------------------------------- simulators that users have


def test_simulators_that_are_missing_or_unknown(monkeypatch):
    with pytest.raises(LaraArgumentError, match="simulator='mars'"):
        open_simulator("mars")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(HostNotInstalled, match="SimplerEnv is not installed"):
        open_simulator("simpler")


def fake_module(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_rotations_are_scipys():
    rotations = pytest.importorskip("scipy.spatial.transform").Rotation
    from lara_adapter.integrations.simulators.libero import axis_angle
    from lara_adapter.integrations.simulators.simpler import euler, rotation

    for seed in range(20):
        quaternion = np.random.default_rng(seed).standard_normal(4)  # w, x, y, z
        quaternion /= np.linalg.norm(quaternion) * np.sign(quaternion[0])
        expected = rotations.from_quat(np.roll(quaternion, -1))
        assert rotation(quaternion) == pytest.approx(expected.as_matrix())
        assert euler(rotation(quaternion)) == pytest.approx(expected.as_euler("xyz"))
        assert axis_angle(np.roll(quaternion, -1)) == pytest.approx(expected.as_rotvec())


@pytest.fixture
def simpler(monkeypatch):
    """SimplerEnv's interface, as far as it is used."""
    calls = []

    class Env:
        def __init__(self, name):
            self.unwrapped = types.SimpleNamespace(get_language_instruction=lambda: f"do {name}")

        def reset(self, seed):
            calls.append(("reset", seed))
            return self.see(), {}

        def see(self):
            return {"agent": {"eef_pos": np.array([0.1, 0.2, 0.3, 0.0, 0.0, 1.0, 0.0, 0.75])}}

        def step(self, action):
            calls.append(("step", np.asarray(action).tolist()))
            return self.see(), 0.0, False, False, {}

        def close(self):
            calls.append(("close",))

    fake_module(monkeypatch, "simpler_env", make=Env, ENVIRONMENTS=["widowx_stack_cube", "google_robot_open_drawer"])
    for name in ("simpler_env.utils", "simpler_env.utils.env"):
        fake_module(monkeypatch, name)
    look = lambda env, seen: np.full((4, 5, 3), 9, np.uint8)  # noqa: E731
    fake_module(monkeypatch, "simpler_env.utils.env.observation_utils", get_image_from_maniskill2_obs_dict=look)
    return calls


def test_simpler(simpler):
    simulator = open_simulator("simpler")
    widowx, google = (simulator.open(task) for task in simulator.tasks())
    widowx.reset(3)
    assert simpler == [("reset", 3)]
    seen = widowx.observe()
    assert seen.views["image_0"].shape == (4, 5, 3)
    # half a turn about y (w, x, y, z = 0, 0, 1, 0), seen from pointing down: a quarter of a turn
    assert seen.states["state"] == pytest.approx([0.1, 0.2, 0.3, 0, np.pi / 2, 0, 0, 0.75], abs=1e-6)
    for given, wanted in ((0.9, 1), (0.1, -1)):
        widowx.step(np.float32([0] * 6 + [given]))
        assert simpler[-1][1][-1] == wanted
    google.reset(0)
    assert google.observe().states["state"] == pytest.approx([0.1, 0.2, 0.3, 0, 1, 0, 0, 0.25])
    google.step(np.float32([0] * 6 + [0.5]))
    assert simpler[-1][1][-1] == 0  # undecided: nothing is held
    for step in range(16):
        google.step(np.float32([0] * 6 + [0.0 if step == 0 else 0.5]))
        assert simpler[-1][1][-1] == (1 if step < 15 else 0)  # closing goes on for 15 steps
