"""What goes wrong on a network and in a policy: each time a clear error in time, and the server goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket as sockets
import threading
import time

import numpy as np
import pytest

pytest.importorskip("psutil")
pytest.importorskip("msgpack")
pytest.importorskip("zmq")

import psutil
import zmq
from helpers.serving_policies import Bare, Echo, observation, process, serving
from test_serving_protocol import HARMFUL, RECORDED

from lara_adapter import ServingError, ServingTimeout
from lara_adapter.serving import PolicyClient, unpack


def within(seconds):
    """Fails if the block takes longer."""

    class Clock:
        def __enter__(self):
            self.begin = time.monotonic()

        def __exit__(self, kind, *rest):
            if kind is None:
                assert time.monotonic() - self.begin < seconds

    return Clock()


def test_server_killed_in_a_request():
    with process() as (child, port), PolicyClient(port=port, timeout_ms=30_000) as client:
        client.get_action(observation())
        threading.Timer(0.1, os.kill, (child.pid, signal.SIGKILL)).start()
        with within(5), pytest.raises(ServingError, match="closed the connection before it answered get_action"):
            client.get_action(observation(sleep=20.0))
        child.wait(10)  # a dying process may still take a connection, and cut it
        client.timeout_ms = 100
        with within(5), pytest.raises(ServingTimeout, match="no answer to get_action within 100 ms"):
            client.get_action(observation())
        assert not client.ping()
        # and a server that comes back is found again, by the same client
        with process(port=port):
            client.wait_until_ready(10)
            assert client.get_action(observation(2.0))[0]["velocity"][0, 0, 0] == 4


def test_server_restarted_between_two_calls():
    with contextlib.ExitStack() as stack:
        _, port = stack.enter_context(process())
        with PolicyClient(port=port, timeout_ms=10_000) as client:
            assert client.get_action(observation(1.0))[0]["velocity"][0, 0, 0] == 2
            stack.close()
            with process(port=port):
                assert client.get_action(observation(2.0))[0]["velocity"][0, 0, 0] == 4


@pytest.fixture
def dead_port():
    """A port that belongs to this test and that nothing listens on."""
    with sockets.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _ask_for_ever(port: int) -> None:
    client = PolicyClient(port=port)
    while True:
        client.get_action(observation(sleep=0.05))


def test_client_killed_in_a_request():
    policy = Echo()
    with serving(policy) as server, PolicyClient(port=server.port, timeout_ms=5000) as client:
        others = [multiprocessing.get_context("spawn").Process(target=_ask_for_ever, args=(server.port,)) for _ in "ab"]
        for other in others:
            other.start()
        _until(lambda: len(policy.calls) >= 4)
        for other in others:
            other.kill()
            other.join(5)
        with within(3):
            assert client.get_action(observation(5.0))[0]["velocity"][0, 0, 0] == 10


def _until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_harmful_messages_get_an_error_each_and_the_server_goes_on():
    context = zmq.Context()
    with serving(Echo()) as server, PolicyClient(port=server.port) as client:
        with context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(f"tcp://127.0.0.1:{server.port}")
            for name, message in HARMFUL.items():
                socket.send(message)
                assert socket.poll(5000), name
                answer = unpack(socket.recv())
                assert set(answer) == {"error"}, name
                assert len(answer["error"]) > 10, name
        assert client.ping()
    context.term()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([1, 2], "a request is a map"),
        ({"endpoint": 5}, "Unknown endpoint"),
        ({"endpoint": "nope"}, "Unknown endpoint: 'nope'; known are describe, get_action, get_modality_config, ping"),
        ({"endpoint": "_call"}, "Unknown endpoint"),
        ({"endpoint": "get_action"}, "missing a required argument: 'observation'"),
        ({"endpoint": "get_action", "data": [1]}, "data is a map"),
        ({"endpoint": "get_action", "data": {"observation": {}, "self": 1}}, "unexpected keyword"),
        ({"endpoint": "get_action", "data": {"observation": {}}}, "KeyError: 'state'"),
        ({}, "missing a required argument"),
    ],
    ids=str,
)
def test_requests_that_are_none(request_, said):
    from lara_adapter.serving import pack

    context = zmq.Context()
    with serving(Echo()) as server, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(f"tcp://127.0.0.1:{server.port}")
        socket.send(pack(request_))
        assert socket.poll(5000)
        assert said in unpack(socket.recv())["error"]
    context.term()


def test_frames_that_no_client_sends():
    """Raw bytes instead of ZMTP, and messages of a wrong number of parts."""
    context = zmq.Context()
    with serving(Echo()) as server, PolicyClient(port=server.port, timeout_ms=5000) as client:
        with sockets.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://127.0.0.1:{server.port}")
            for frames in ([b""], [b"x"], [b"", b"", b"", b""], [b"no", b"delimiter"], [b"a", b"", b"b", b"c"]):
                socket.send_multipart(frames)
            socket.send_multipart([b"", RECORDED["ping"]])  # as a REQ socket would
            assert socket.poll(5000)
            assert socket.recv_multipart() == [b"", RECORDED["reply to ping"]]
        assert client.ping()
    context.term()


def test_oversized_messages():
    with (
        serving(Echo(), max_message_bytes=100_000) as server,
        PolicyClient(port=server.port, timeout_ms=20_000, max_message_bytes=50_000) as careful,
        PolicyClient(port=server.port, timeout_ms=20_000) as careless,
    ):
        large = observation(big=np.zeros(200_000, np.uint8))
        with pytest.raises(ServingError, match=r"has 2\d{5} bytes, above max_message_bytes=50000"):
            careful.get_action(large)
        # libzmq cuts the connection, which the client notices long before its time is over
        with within(5), pytest.raises(ServingError, match=r"refuses messages of 2\d{5} bytes"):
            careless.get_action(large)
        assert careless.ping()
        assert careful.ping()


def test_answers_above_the_clients_limit():
    class Huge:
        def get_action(self, observation):
            return np.zeros(observation["size"], np.uint8)

    with serving(Huge()) as server, PolicyClient(port=server.port, max_message_bytes=10_000) as client:
        with within(5), pytest.raises(ServingError, match="closed the connection"):
            client.get_action({"size": 20_000})
        assert len(client.get_action({"size": 100})[0]) == 100


def test_errors_of_the_policy_are_the_answer(caplog):
    with serving(Bare()) as server, PolicyClient(port=server.port) as client:
        with pytest.raises(ServingError, match=r"ValueError: state: got \[2, 4\], but \[1, 4\] is expected"):
            client.get_action({"state": np.ones((2, 4))})
        assert "Traceback" in caplog.text  # where the policy is
        with pytest.raises(ServingError, match="action is not finite in 1 of 2 places"):
            client.get_action({"state": np.ones((1, 4)), "poison": True})
        client.get_action({"state": np.ones((1, 4))})


def test_an_action_that_cannot_be_sent_is_an_error():
    class Odd:
        def get_action(self, observation):
            return {"action": object()}

    with serving(Odd()) as server, PolicyClient(port=server.port) as client:
        with pytest.raises(ServingError, match="cannot be sent"):
            client.get_action({})
        assert client.ping()


class Gated(Echo):
    """It answers no sooner than it is let."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def get_action(self, observation, options=None):
        answer = super().get_action(observation, options)
        assert self.gate.wait(30)
        return answer


def test_a_slow_policy_times_out_and_the_late_answer_is_never_taken_for_another():
    policy = Gated()
    with serving(policy) as server, PolicyClient(port=server.port, timeout_ms=100) as client:
        begin = time.monotonic()
        with pytest.raises(ServingTimeout, match="no answer to get_action within 100 ms"):
            client.get_action(observation(1.0))
        assert time.monotonic() - begin >= 0.1
        assert policy.calls == [1.0]
        policy.gate.set()
        client.timeout_ms = 5000
        assert client.get_action(observation(2.0))[0]["velocity"][0, 0, 0] == 4  # not 2
        assert policy.calls == [1.0, 2.0]


def test_requests_that_a_client_gave_up_are_not_worked_on():
    policy = Gated()
    with (
        serving(policy) as server,
        PolicyClient(port=server.port, timeout_ms=50) as hasty,
        PolicyClient(port=server.port, timeout_ms=30_000) as busy,
    ):
        thread = threading.Thread(target=busy.get_action, args=(observation(0.0),))
        thread.start()
        _until(lambda: policy.calls == [0.0])
        for value in (1.0, 2.0, 3.0):
            with pytest.raises(ServingTimeout):
                hasty.get_action(observation(value))
        hasty.timeout_ms = 20_000
        threading.Timer(0.2, policy.gate.set).start()
        assert hasty.get_action(observation(4.0))[0]["velocity"][0, 0, 0] == 8
        thread.join(5)
        assert policy.calls == [0.0, 4.0]


def test_no_server_at_all(dead_port):
    with PolicyClient(port=dead_port, timeout_ms=100) as client:
        with within(2):
            assert not client.ping()
        with within(3), pytest.raises(ServingTimeout, match="no server answers"):
            client.wait_until_ready(0.25)
    with pytest.raises(ServingError, match="closed"):
        client.get_action({})


def test_waiting_for_a_server_does_not_wait_for_a_wrong_token():
    with (
        serving(Echo(), api_token="secret") as server,
        PolicyClient(port=server.port) as client,
        within(5),
        pytest.raises(ServingError, match="Unauthorized"),
    ):
        client.wait_until_ready(60)


def test_waiting_for_a_server_behind_a_tunnel():
    """ssh -L takes connections before there is a server at its other end, and cuts each at once."""
    with sockets.create_server(("127.0.0.1", 0)) as tunnel:
        port, taken = tunnel.getsockname()[1], []

        def cut():
            with contextlib.suppress(OSError):
                while True:
                    tunnel.accept()[0].close()
                    taken.append(time.monotonic())

        thread = threading.Thread(target=cut, daemon=True)
        thread.start()
        with PolicyClient(port=port, timeout_ms=5000) as client:
            with within(4), pytest.raises(ServingTimeout, match=r"no server answers .*closed the connection"):
                client.wait_until_ready(0.7)
            assert 1 <= len(taken) < 20, "it knocks without a pause"
            tunnel.shutdown(sockets.SHUT_RDWR)
            tunnel.close()
            thread.join(5)
            with process(port=port):
                client.wait_until_ready(20)
                assert client.ping()


def test_waiting_with_a_closed_client_ends_at_once(dead_port):
    client = PolicyClient(port=dead_port)
    client.close()
    with within(2), pytest.raises(ServingError, match="closed"):
        client.wait_until_ready(30)


def test_threads_share_a_client():
    with serving(Echo()) as server, PolicyClient(port=server.port) as client:
        wrong = []

        def ask(value):
            for _ in range(20):
                if client.get_action(observation(value))[0]["velocity"][0, 0, 0] != 2 * value:
                    wrong.append(value)

        threads = [threading.Thread(target=ask, args=(float(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not wrong


def test_memory_stays_flat_with_eight_clients():
    """`benchmarks.speed.serving --soak 600` is the long one. One client gives up now and then, one sends rubbish."""
    warm, most = 40, 240  # requests of each client, before the memory is measured first and at the end
    with process() as (child, port):
        errors, middle = [], threading.Barrier(9)

        def hammer(index):
            with PolicyClient(port=port, timeout_ms=20_000) as client:
                for count in range(most):
                    if count == warm:
                        middle.wait(60)
                        middle.wait(60)
                    value = float(1000 * index + count)
                    if index == 0 and count % 10 == 0:  # gives up
                        with contextlib.suppress(ServingTimeout):
                            slow = {"observation": observation(value, sleep=0.01)}
                            client.call_endpoint("get_action", slow, timeout_ms=2)
                    if index == 1 and count % 10 == 0:  # sends what the policy cannot take
                        with pytest.raises(ServingError, match="KeyError"):
                            client.get_action({"state": {}})
                    if client.get_action(observation(value))[0]["velocity"][0, 0, 0] != 2 * value:
                        errors.append(f"client {index} got the answer to another request")

        def guarded(index):
            try:
                hammer(index)
            except BaseException as error:  # a thread would only print it
                errors.append(f"{index}: {error!r}")
                middle.abort()

        threads = [threading.Thread(target=guarded, args=(index,)) for index in range(8)]
        server = psutil.Process(child.pid)
        for thread in threads:
            thread.start()
        middle.wait(60)
        before = server.memory_info().rss
        middle.wait(60)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
        grown = server.memory_info().rss - before
        assert not errors
        assert grown < 4e6, f"{grown} bytes in {8 * (most - warm)} requests of 6 kB"
        assert len(server.open_files()) + server.num_fds() < 80
