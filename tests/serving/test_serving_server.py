"""Server and client together: every endpoint, and what the server does with policies of several forms."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("msgpack")
pytest.importorskip("zmq")

import zmq
from helpers.serving_policies import Bare, Echo, observation, serving
from test_serving_protocol import RECORDED, same

from lara_adapter import HostNotInstalled, LaraArgumentError, ServingError
from lara_adapter.serving import ModalityConfig, PolicyClient, PolicyServer, unpack


def test_every_endpoint():
    policy = Echo()
    policy.get_modality_config = lambda: {"action": ModalityConfig([0, 1], ["velocity"])}
    with serving(policy, description="an echo") as server, PolicyClient(port=server.port) as client:
        assert server.host == "127.0.0.1"
        assert client.ping()
        action, info = client.get_action(observation(3.0), {"seed": 7})
        assert same(action, {"velocity": np.full((1, 1, 2), 6, np.float32)})
        assert info == {"options": {"seed": 7}}
        assert client.reset({"seed": 1}) == {"reset": {"seed": 1}}
        assert policy.resets == [{"seed": 1}]
        assert client.get_modality_config() == {"action": ModalityConfig([0, 1], ["velocity"])}
        described = client.describe()
        assert (described["policy"], described["options"]) == ("an echo", True)


def test_a_policy_that_has_get_action_alone():
    with serving(Bare()) as server, PolicyClient(port=server.port) as client:
        action, info = client.get_action({"state": np.ones((1, 4), np.float32)})
        assert same(action, np.ones((1, 2), np.float32))
        assert info == {}
        assert client.reset() == {}
        assert client.get_modality_config() == {}
        assert client.describe()["options"] is False
        with pytest.raises(ServingError, match="takes no options, but got \\['seed'\\]"):
            client.get_action({"state": np.ones((1, 4))}, {"seed": 1})


def test_endpoints_of_ones_own():
    with serving(Echo()) as server, PolicyClient(port=server.port) as client:
        server.register_endpoint("add", lambda a, b=1: a + b)
        assert client.call_endpoint("add", {"a": 2, "b": 3}) == 5
        assert client.call_endpoint("add", {"a": 2}) == 3
        with pytest.raises(ServingError, match=r"add: missing a required argument: 'a'; got \['c'\]"):
            client.call_endpoint("add", {"c": 2})


@pytest.mark.parametrize(
    ("token", "accepted"), [("secret", True), ("Secret", False), ("", False), (None, False), ("sécret", False)]
)
def test_every_endpoint_asks_for_the_token(token, accepted):
    policy = Echo()
    with (
        serving(policy, api_token="secret", allow_kill=True) as server,
        PolicyClient(port=server.port, api_token=token) as client,
    ):
        assert client.ping() is accepted
        for call in (lambda: client.get_action(observation()), client.reset, client.describe):
            if accepted:
                call()
            else:
                with pytest.raises(ServingError, match="Unauthorized: Invalid API token"):
                    call()
        if not accepted:
            assert policy.calls == policy.resets == []
            with pytest.raises(ServingError, match="Unauthorized"):
                client.kill_server()


def test_the_token_is_compared_in_constant_time(monkeypatch):
    import hmac

    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    with serving(Echo(), api_token="secret") as server, PolicyClient(port=server.port, api_token="wrong") as client:
        assert not client.ping()
    assert compared == [(b"wrong", b"secret")]


def test_a_client_can_stop_the_server_only_where_that_is_allowed():
    with serving(Echo()) as server, PolicyClient(port=server.port) as client:
        with pytest.raises(ServingError, match="Unknown endpoint: 'kill'"):
            client.kill_server()
        assert client.ping()
    server = PolicyServer(Echo(), port=0, allow_kill=True)
    import threading

    thread = threading.Thread(target=server.run)
    thread.start()
    with PolicyClient(port=server.port, timeout_ms=3000) as client:
        client.kill_server()
        thread.join(5)
        assert not thread.is_alive()


def test_open_to_the_network_without_a_token_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        with PolicyServer(Echo(), port=0):
            pass
        assert caplog.text == ""
        with PolicyServer(Echo(), port=0, host="0.0.0.0", api_token="x"):
            pass
        assert caplog.text == ""
        with PolicyServer(Echo(), port=0, host="0.0.0.0"):
            assert "no api_token" in caplog.text


def test_arguments_that_cannot_be():
    with pytest.raises(LaraArgumentError, match="policy: dict has no get_action"):
        PolicyServer({})
    with pytest.raises(LaraArgumentError, match="port=70000"):
        PolicyServer(Echo(), port=70000)
    with pytest.raises(LaraArgumentError, match="api_token"):
        PolicyServer(Echo(), port=0, api_token="")
    with pytest.raises(LaraArgumentError, match="timeout_ms=0"):
        PolicyClient(timeout_ms=0)
    with PolicyServer(Echo(), port=0) as first, pytest.raises(ServingError, match="cannot be listened on"):
        PolicyServer(Echo(), port=first.port)


@pytest.mark.parametrize("name", ["ping", "get_action", "reset", "get_modality_config"])
def test_recorded_requests_of_a_plain_req_socket_are_answered(name):
    """What GR00T's client sends, from a socket that knows nothing of our client's envelope."""
    context = zmq.Context()
    with serving(Echo()) as server, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{server.port}")
        socket.send(RECORDED[name])
        assert socket.poll(5000)
        answer = socket.recv()
    context.term()
    if name == "ping":
        assert answer == RECORDED["reply to ping"]
    elif name == "get_action":
        assert same(unpack(answer), [{"velocity": np.float32([[[0.5, -3]]])}, {"options": None}])
    else:
        assert "error" not in unpack(answer)


def test_our_client_takes_recorded_replies_of_a_plain_rep_socket():
    """What GR00T's server sends; it echoes our client's envelope as every REP socket does."""
    import threading

    context = zmq.Context()
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    received = []

    def answer():
        for name in ("reply to ping", "reply to get_action", "reply to get_modality_config", "error"):
            received.append(socket.recv())
            socket.send(RECORDED[name])

    thread = threading.Thread(target=answer)
    thread.start()
    with PolicyClient(port=port, timeout_ms=5000) as client:
        assert client.ping()
        action, info = client.get_action(unpack(RECORDED["get_action"])["data"]["observation"])
        assert same(action, {"velocity": np.float32([[[1, 2], [3, 4]]])})
        assert info == {}
        assert client.get_modality_config()["action"].modality_keys == ["velocity"]
        with pytest.raises(ServingError, match="Unauthorized"):
            client.reset()
    thread.join(5)
    socket.close(0)
    context.term()
    assert received == [RECORDED[name] for name in ("ping", "get_action", "get_modality_config", "reset")]


def test_neither_side_imports_torch_or_a_part_of_lara():
    code = """
import sys
for name in ("torch", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it would raise
from lara_adapter.serving import PolicyClient, PolicyServer
import numpy as np
class Policy:
    def get_action(self, observation): return observation["a"]
with PolicyServer(Policy(), port=0) as server, PolicyClient(port=server.port) as client:
    import threading
    thread = threading.Thread(target=server.run); thread.start()
    assert client.get_action({"a": np.ones(2)})[0].sum() == 2
    server.stop(); thread.join()
print(sorted(name for name in sys.modules if name.startswith("lara_adapter")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [
        "lara_adapter", "lara_adapter._version", "lara_adapter.errors", "lara_adapter.serving",
        "lara_adapter.serving.address", "lara_adapter.serving.client", "lara_adapter.serving.protocol",
        "lara_adapter.serving.server",
    ]  # fmt: skip


def test_without_pyzmq_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(HostNotInstalled, match=r"pip install 'lara-adapter\[serve\]'"):
        PolicyClient()
