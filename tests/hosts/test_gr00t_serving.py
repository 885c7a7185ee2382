"""With the real GR00T N1.6: its client at our server, our client at its server, its checkpoint behind `lara serve`."""

from __future__ import annotations

import threading

import numpy as np
import pytest

pytest.importorskip(
    "gr00t",
    reason="GR00T N1.6 is on no registry: set LARA_GR00T_SRC to a checkout, or install it",
    exc_type=ImportError,
)
pytest.importorskip("zmq", reason="the extra serve is not installed: pip install pyzmq msgpack")

from gr00t.configs.data.embodiment_configs import MODALITY_CONFIGS
from gr00t.data.types import ActionConfig, ActionFormat, ActionRepresentation, ActionType
from gr00t.data.types import ModalityConfig as TheirModalityConfig
from gr00t.policy import server_client as theirs
from gr00t.policy.policy import BasePolicy
from helpers.serving_policies import serving
from lara_adapter.integrations.served import open_served

from examples import gr00t_tiny
from lara_adapter import LatentActionModel, PolicySourceError, ServingError, ServingTimeout, attach_lara
from lara_adapter.serving import ModalityConfig, PolicyClient, pack, unpack

TAG = "new_embodiment"
ACTIONS = [ActionConfig(ActionRepresentation.RELATIVE, ActionType.EEF, ActionFormat.XYZ_ROT6D, "position")]
CONFIG = {
    "video": TheirModalityConfig([0], ["front", "wrist"]),
    "state": TheirModalityConfig([0], ["position"], mean_std_embedding_keys=["position"]),
    "action": TheirModalityConfig([0, 1], ["velocity"], action_configs=ACTIONS),
}
OBSERVATION = {
    "video": {"front": np.arange(48, dtype=np.uint8).reshape(1, 1, 4, 4, 3)},
    "state": {"position": np.float32([[[1, 2]]])},
    "language": {"task": [["push"]]},
}


class Policy(BasePolicy):
    """A policy of GR00T's own base class."""

    def __init__(self):
        super().__init__(strict=True)
        self.seen = []

    def check_observation(self, observation):
        assert "video" in observation, "Observation must contain a 'video' key"

    def check_action(self, action):
        assert action["velocity"].dtype == np.float32

    def _get_action(self, observation, options=None):
        self.seen.append((observation, options))
        return {"velocity": np.repeat(observation["state"]["position"], 2, axis=1)}, {"confidence": 0.5}

    def reset(self, options=None):
        return {"began": options}

    def get_modality_config(self):
        return CONFIG


def plain(value):
    """Whatever side made it, to compare."""
    return pack(value)


def test_the_bytes_are_gr00ts():
    for content in (OBSERVATION, CONFIG, [{"velocity": np.zeros((1, 2, 2), np.float32)}, {}], {"error": "x"}):
        assert pack(content) == theirs.MsgSerializer.to_bytes(content)
    # and theirs, read by us and sent back, is theirs again
    back = theirs.MsgSerializer.from_bytes(pack(unpack(theirs.MsgSerializer.to_bytes(CONFIG))))
    assert back == CONFIG


def test_gr00ts_client_at_our_server():
    policy = Policy()
    with serving(policy, api_token="secret", allow_kill=True) as server:
        client = theirs.PolicyClient("127.0.0.1", server.port, api_token="secret")
        assert client.ping()
        action, info = client.get_action(OBSERVATION, {"a": 1})
        assert np.array_equal(action["velocity"], np.float32([[[1, 2], [1, 2]]]))
        assert info == {"confidence": 0.5}
        assert plain(policy.seen) == plain([(OBSERVATION, {"a": 1})])
        assert client.reset({"b": 2}) == {"began": {"b": 2}}
        assert client.get_modality_config() == CONFIG
        with pytest.raises(RuntimeError, match="Server error: AssertionError: Observation must contain a 'video' key"):
            client.get_action({})
        stranger = theirs.PolicyClient("127.0.0.1", server.port, api_token="wrong")
        with pytest.raises(RuntimeError, match="Server error: Unauthorized: Invalid API token"):
            stranger.get_action(OBSERVATION)
        assert client.ping()
        client.kill_server()
        del client, stranger


@pytest.fixture
def their_server():
    server = theirs.PolicyServer(Policy(), host="127.0.0.1", port="*", api_token="secret")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    port = int(server.socket.getsockopt_string(theirs.zmq.LAST_ENDPOINT).rpartition(":")[2])
    yield server, port
    if thread.is_alive():
        with PolicyClient(port=port, api_token="secret", timeout_ms=2000) as client:
            client.kill_server()
    thread.join(5)
    server.socket.close(0)
    server.context.term()


def test_our_client_at_gr00ts_server(their_server):
    server, port = their_server
    with PolicyClient(port=port, api_token="secret") as client:
        assert client.ping()
        action, info = client.get_action(OBSERVATION, {"a": 1})
        assert np.array_equal(action["velocity"], np.float32([[[1, 2], [1, 2]]]))
        assert info == {"confidence": 0.5}
        assert plain(server.policy.seen) == plain([(OBSERVATION, {"a": 1})])
        assert client.reset({"b": 2}) == {"began": {"b": 2}}
        config = client.get_modality_config()
        assert isinstance(config["video"], ModalityConfig)
        assert config["action"].action_configs == [
            {"rep": "RELATIVE", "type": "EEF", "format": "XYZ_ROT6D", "state_key": "position"}
        ]
        assert client.describe() == {}  # it does not know the question
        with pytest.raises(ServingError, match="answered get_action with an error: Observation must contain"):
            client.get_action({})
    with PolicyClient(port=port) as stranger, pytest.raises(ServingError, match="Unauthorized"):
        stranger.wait_until_ready(30)


def test_our_client_is_good_again_after_a_timeout_at_gr00ts_server(their_server):
    server, port = their_server
    release = threading.Event()
    server.register_endpoint("wait", lambda: release.wait(10), requires_input=False)
    with PolicyClient(port=port, api_token="secret", timeout_ms=200) as client:
        with pytest.raises(ServingTimeout):
            client.call_endpoint("wait")
        release.set()
        client.timeout_ms = 5000
        assert client.reset({"b": 3}) == {"began": {"b": 3}}  # not the late answer to wait


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint in GR00T's layout, with LARA in it, as a training run leaves it, and exported."""
    from lara_adapter.integrations.gr00t import export_policy
    from transformers import AutoModel, AutoProcessor

    root = tmp_path_factory.mktemp("gr00t_serving")
    kept = dict(MODALITY_CONFIGS)
    gr00t_tiny.import_file(gr00t_tiny.write_modality_config(root / "modality.py"))
    gr00t_tiny.write_base_model(root / "base")
    gr00t_tiny.write_lam(root / "lam")
    with gr00t_tiny.tiny_backbone():
        model = AutoModel.from_pretrained(root / "base")
        attach_lara(model, LatentActionModel.from_pretrained(root / "lam"))
        model.save_pretrained(root / "run")
        AutoProcessor.from_pretrained(root / "base").save_pretrained(root / "run")
        export_policy(root / "run", root / "trained")
        yield root / "trained"
    MODALITY_CONFIGS.clear()
    MODALITY_CONFIGS.update(kept)


def observation(seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    return {
        "video": {view: random.integers(0, 255, (1, 1, 64, 64, 3), dtype=np.uint8) for view in ("front", "wrist")},
        "state": {"position": np.float32([[[0.1, -0.2]]])},
        "language": {"annotation.human.task_description": [["move the square"]]},
    }


def test_a_checkpoint_acts_through_the_socket_as_gr00ts_own_policy(checkpoint):
    import torch
    from gr00t.data.embodiment_tags import EmbodimentTag
    from gr00t.policy.gr00t_policy import Gr00tPolicy

    stock = Gr00tPolicy(EmbodimentTag(TAG), str(checkpoint), device="cpu")
    torch.manual_seed(5)
    expected = stock.get_action(observation())[0]["velocity"]
    with serving(open_served(checkpoint)) as server, PolicyClient(port=server.port, timeout_ms=60_000) as client:
        assert client.get_modality_config()["video"].modality_keys == ["front", "wrist"]
        ours = client.get_action(observation(), {"seed": 5})[0]["velocity"]
        other = client.get_action(observation(), {"seed": 6})[0]["velocity"]
        their_client = theirs.PolicyClient("127.0.0.1", server.port)
        again = their_client.get_action(observation(), {"seed": 5})[0]["velocity"]
        wrong = {**observation(), "video": {view: np.zeros((1, 1, 64, 64, 3)) for view in ("front", "wrist")}}
        with pytest.raises(ServingError, match="Video key 'front' must be a numpy array of type"):
            client.get_action(wrong)
        del their_client
    assert expected.shape == (1, 16, 2)
    assert np.array_equal(ours, expected)
    assert np.array_equal(again, expected)
    assert not np.array_equal(ours, other)


def test_an_unknown_embodiment_is_refused(checkpoint):
    with pytest.raises(PolicySourceError, match=r"embodiment_tag='gr1', but the checkpoint knows \['new_embodiment'\]"):
        open_served(checkpoint, embodiment_tag="gr1")
