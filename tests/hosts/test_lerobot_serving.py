"""Real LeRobot policies, saved, served, and acting through the socket as they act directly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="LeRobot is not installed: make test-lerobot")
pytest.importorskip("zmq", reason="the extra serve is not installed: pip install pyzmq msgpack")
pytest.importorskip("msgpack", reason="the extra serve is not installed: pip install pyzmq msgpack")

from helpers.lerobot_processors import tiny_processors
from helpers.lerobot_tiny import ACTION, CAMERA, POLICIES, STATE, make_batch, make_policy
from helpers.serving_policies import serving
from helpers.toys import OwnLam
from lara_adapter.integrations.lerobot import stock_saves
from lara_adapter.integrations.lerobot.serve import LeRobotPolicy, load_stock
from lara_adapter.integrations.served import open_served
from lerobot.policies.factory import make_pre_post_processors

from lara_adapter import PolicySourceError, ServingError, attach_lara
from lara_adapter.serving import PolicyClient

ROOT = Path(__file__).resolve().parents[2]
STATISTICS = {
    CAMERA: {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.3), "min": torch.zeros(3, 1, 1),
             "max": torch.ones(3, 1, 1)},
    STATE: {"mean": torch.tensor([0.1, 0.2, 0.3, 0.4]), "std": torch.full((4,), 2.0), "min": -torch.ones(4),
            "max": torch.ones(4)},
    "action": {"mean": torch.tensor([1.0, 2.0, 3.0]), "std": torch.tensor([0.5, 2.0, 1.0]),
               "min": torch.tensor([-1.0, -2.0, -3.0]), "max": torch.tensor([1.0, 2.0, 5.0])},
}  # fmt: skip
for _row in STATISTICS.values():  # pi0.5 normalises by quantiles
    _row.update(q01=0.9 * _row["min"], q99=0.9 * _row["max"])


def save(policy, folder: Path) -> Path:
    """The policy and its processors, as lerobot-train leaves them."""
    before, after = make_pre_post_processors(policy.config, dataset_stats=STATISTICS)
    for part in (policy, before, after):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A Multi-Task DiT with its processors, post-trained with LARA for a step."""
    torch.manual_seed(0)
    policy = make_policy("multi_task_dit")
    lara = attach_lara(policy, OwnLam())
    stock_saves(lara)
    optimizer = torch.optim.AdamW(policy.parameters())
    policy.forward(make_batch("multi_task_dit"))[0].backward()
    optimizer.step()
    return save(policy, tmp_path_factory.mktemp("policy") / "clip-policy")


def observation(batch: int = 2, steps: int = 1) -> dict:
    random = np.random.default_rng(0)
    return {
        "video": {"cam": random.integers(0, 255, (batch, steps, 32, 32, 3), dtype=np.uint8)},
        "state": {"state": random.standard_normal((batch, steps, 4)).astype(np.float32)},
        "language": {"task": [["push the block"]] * batch},
    }


def directly(folder: Path, given: dict, seeds: list[int], steps: int) -> np.ndarray:
    """As LeRobot's own rollouts act: select_action, step by step, through its processors. [B, H, A]"""
    policy, before, after = load_stock(folder, "cpu")
    policy.reset()
    actions = []
    with torch.inference_mode():
        for time in range(steps):
            queue = policy._queues["action"]
            if time < len(seeds):
                queue.clear()
                torch.manual_seed(seeds[time])
            seen = min(time, given["video"]["cam"].shape[1] - 1)
            batch = before(
                {
                    CAMERA: torch.from_numpy(given["video"]["cam"][:, seen]).permute(0, 3, 1, 2).float() / 255,
                    STATE: torch.from_numpy(given["state"]["state"][:, seen]),
                    "task": [row[0] for row in given["language"]["task"]],
                }
            )
            actions.append(after(policy.select_action(batch)).numpy())
    return np.stack(actions, axis=1)


def test_acts_through_the_socket_as_directly_bit_by_bit(trained):
    given = observation()
    expected = directly(trained, given, seeds=[7], steps=8)
    assert expected.shape == (2, 8, ACTION)
    with serving(open_served(trained)) as server, PolicyClient(port=server.port) as client:
        config = client.get_modality_config()
        assert (config["video"].modality_keys, config["video"].delta_indices) == (["cam"], [0])
        assert (config["state"].modality_keys, config["action"].modality_keys) == (["state"], ["action"])
        assert config["action"].delta_indices == list(range(8))
        chunks = [client.get_action(given, {"seed": seed})[0]["action"] for seed in (7, 8, 7)]
    assert chunks[0].dtype == np.float32
    assert np.array_equal(chunks[0], expected)
    assert np.array_equal(chunks[0], chunks[2])
    assert not np.array_equal(chunks[0], chunks[1])


def test_a_policy_that_looks_back_gets_its_history_from_the_client(tmp_path):
    policy = make_policy("multi_task_dit", n_obs_steps=2)
    folder = save(policy, tmp_path / "clip-policy")
    given = observation(batch=1, steps=2)
    expected = directly(folder, given, seeds=[1, 7], steps=9)[:, 1:]  # the second chunk saw both steps
    served = open_served(folder)
    assert served.get_modality_config()["video"].delta_indices == [-1, 0]
    for _ in range(2):  # nothing is left from the first call
        chunk = served.get_action(given, {"seed": 7})[0]["action"]
        assert np.array_equal(chunk, expected[:, : chunk.shape[1]])


@pytest.fixture
def processed():
    """Makes a policy's real processors; their tokens come from the tiny tokenizer instead of a download."""
    with tiny_processors():
        yield lambda policy: make_pre_post_processors(policy.config, dataset_stats=STATISTICS)


def predicted(policy, before, given: dict) -> torch.Tensor:
    """The chunk as LeRobot predicts it, still normalised."""
    seen = {CAMERA: torch.from_numpy(given["video"]["cam"][:, 0]).permute(0, 3, 1, 2).float() / 255}
    batch = before({**seen, STATE: torch.from_numpy(given["state"]["state"][:, 0]), "task": ["push the block"] * 2})
    policy.reset()
    torch.manual_seed(3)
    with torch.inference_mode():
        return policy.predict_action_chunk(batch)


def sized(policy) -> dict:
    """An observation whose pictures have the size that the tiny policy wants."""
    given, side = observation(), policy.config.input_features[CAMERA].shape[-1]
    given["video"]["cam"] = given["video"]["cam"][:, :, :side, :side]
    return given


@pytest.mark.parametrize("kind", [kind for kind in POLICIES if kind != "multi_task_dit"])
def test_policies_that_predict_a_chunk_at_once(kind, processed):
    """Against LeRobot's own prediction, each action through the processors alone; the policy is built here."""
    torch.manual_seed(0)
    policy = make_policy(kind, **({"tokenizer_max_length": 8} if kind == "xvla" else {})).eval()
    before, after = processed(policy)
    served, given = LeRobotPolicy(policy, before, after), sized(policy)
    chunk = served.get_action(given, {"seed": 3})[0]["action"]
    expected = torch.stack([after(action) for action in predicted(policy, before, given).unbind(1)], 1)
    assert chunk.shape == (2, 8, ACTION)
    assert chunk.dtype == np.float32
    assert np.array_equal(chunk, expected.float().numpy())
    assert not np.array_equal(chunk, served.get_action(given, {"seed": 4})[0]["action"])
    assert served.get_modality_config()["action"].delta_indices == list(range(8))


def test_gr00ts_relative_actions_are_decoded_in_one_piece(processed):
    """Each step has statistics of its own, and all are relative to the state that the chunk was predicted from."""
    policy = make_policy("groot", use_relative_actions=True, relative_exclude_joints=["grip"]).eval()
    spread = torch.arange(1.0, 25.0).reshape(8, 3) / 10
    rows = {STATE: STATISTICS[STATE], "action": {"min": -spread, "max": spread, "mean": 0 * spread, "std": spread}}
    meta = SimpleNamespace(
        features={"action": {"names": ["x", "y", "grip"]}, STATE: {"names": ["x", "y", "z", "grip"]}},
        stats={STATE: STATISTICS[STATE], "action": STATISTICS["action"]},
        camera_keys=[CAMERA],
    )
    before, after = make_pre_post_processors(policy.config, dataset_stats=rows, dataset_meta=meta)
    served, given = LeRobotPolicy(policy, before, after), sized(policy)
    chunk = served.get_action(given, {"seed": 3})[0]["action"]
    raw = predicted(policy, before, given)
    assert np.array_equal(chunk, after(raw).float().numpy())
    moved = torch.from_numpy(given["state"]["state"][:, :, :2]) + raw[..., :2].clamp(-1, 1) * spread[:, :2]  # by hand
    np.testing.assert_allclose(chunk[..., :2], moved.numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="one step at a time"):
        after(raw[:, 0])  # why


@pytest.mark.parametrize("kind", ["pi0", "pi05", "smolvla", "xvla"])
def test_cameras_that_are_kept_free_are_not_asked_for(kind, processed):
    """`empty_cameras` puts observation.images.empty_camera_0 among the policy's inputs; no robot has that one."""
    policy = make_policy(kind, empty_cameras=1, **({"tokenizer_max_length": 8} if kind == "xvla" else {})).eval()
    policy.config.validate_features()
    assert f"{CAMERA.rpartition('.')[0]}.empty_camera_0" in policy.config.input_features
    before, after = processed(policy)
    served, given = LeRobotPolicy(policy, before, after), sized(policy)
    assert served.get_modality_config()["video"].modality_keys == ["cam"]
    chunk = served.get_action(given, {"seed": 3})[0]["action"]
    expected = torch.stack([after(action) for action in predicted(policy, before, given).unbind(1)], 1)
    assert np.array_equal(chunk, expected.float().numpy())


def test_a_policy_with_lora_is_served_on_its_base(tmp_path):
    """A checkpoint of `--peft.*` holds the LoRA alone and names the policy it belongs to."""
    peft = pytest.importorskip("peft")
    base = make_policy("multi_task_dit")
    folder = save(base, tmp_path / "clip-base")
    base.config.pretrained_path = str(folder)
    tuned = base.wrap_with_peft(peft.LoraConfig(r=2, target_modules=POLICIES["multi_task_dit"].lora))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    checkpoint = tmp_path / "clip-lora"
    for part in (tuned, tuned.config, *make_pre_post_processors(base.config, dataset_stats=STATISTICS)):
        part.save_pretrained(checkpoint)  # as lerobot-train leaves them
    assert not (checkpoint / "model.safetensors").exists()
    whole = tuned.eval().merge_and_unload()
    whole.config.use_peft = False
    merged = save(whole, tmp_path / "clip-merged")
    given = observation()
    with_lora, as_one, without = (
        open_served(source).get_action(given, {"seed": 7})[0]["action"] for source in (checkpoint, merged, folder)
    )
    np.testing.assert_allclose(with_lora, as_one, rtol=1e-4, atol=1e-5)
    assert np.abs(with_lora - without).max() > 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"video": {}}, "the view 'cam' is expected"),
        ({"video": {"cam": np.zeros((2, 1, 32, 32, 3), np.float32)}}, r"uint8 \[B, 1, H, W, 3\], but is float32"),
        ({"video": {"cam": np.zeros((2, 3, 32, 32, 3), np.uint8)}}, r"but is uint8 \[2, 3, 32, 32, 3\]"),
        ({"state": {"state": np.zeros((2, 1, 5), np.float32)}}, r"float32 \[B, 1, 4\], but is float32 \[2, 1, 5\]"),
        ({"state": {"hand": np.zeros((2, 1, 4), np.float32)}}, r"missing; there is \['hand'\]"),
        ({"state": {"state": np.full((2, 1, 4), np.nan, np.float32)}}, "NaN"),
        ({"language": {"task": ["push"]}}, r"must hold \[str\] for each of 2"),
        ({"state": {"state": np.zeros((3, 1, 4), np.float32)}}, r"one batch size is expected, .*'cam': 2, 'state': 3"),
        ({"state": None}, 'the maps "video", "state" and "language"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_observations_that_do_not_fit(trained, change, said):
    with (
        serving(_once(trained)) as server,
        PolicyClient(port=server.port) as client,
        pytest.raises(ServingError, match=said),
    ):
        client.get_action({**observation(), **change})


_LOADED: dict[Path, object] = {}


def _once(folder: Path):
    return _LOADED.setdefault(folder, open_served(folder))


def test_a_folder_without_processors_is_refused(tmp_path):
    make_policy("multi_task_dit").save_pretrained(tmp_path / "clip-policy")
    with pytest.raises(PolicySourceError, match=r"has no policy_preprocessor\.json"):
        open_served(tmp_path / "clip-policy")


def test_lara_serve_loads_no_part_of_lara(trained):
    """The command itself, on a checkpoint made with LARA, in a process of its own."""
    program = """
import sys
from lara_adapter import cli
import lara_adapter.serving.server as module
run = module.PolicyServer.run
def watched(server):
    names = [name for name, _ in server.policy.policy.named_modules()]
    parts = [name for name in names if "lara" in name or "projector" in name]
    loaded = sorted(name for name in sys.modules if name.startswith("lara_adapter"))
    server.register_endpoint("loaded", lambda: [parts, loaded], False)
    run(server)
module.PolicyServer.run = watched
sys.exit(cli.main(sys.argv[1:]))
"""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(trained), "--port", "0", "--device", "cpu", "--allow-kill"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        line = child.stdout.readline()
        assert line.startswith(f"serving {trained} on tcp://127.0.0.1:"), line
        with PolicyClient(port=int(line.rpartition(":")[2]), timeout_ms=60_000) as client:
            assert client.get_action(observation(), {"seed": 0})[0]["action"].shape == (2, 8, ACTION)
            parts, loaded = client.call_endpoint("loaded")
            client.kill_server()
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.stdout.close()
    assert parts == []
    allowed = ("_version", "cli", "errors", "storage", "serving", "integrations")
    assert [name for name in loaded if "." in name and name.split(".")[1] not in allowed] == []
    host = "lara_adapter.integrations.lerobot"
    assert {name for name in loaded if name.startswith(host)} == {host, f"{host}.serve"}
