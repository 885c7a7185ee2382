"""Clients and servers in other processes: forked ones, DataLoader workers, and ones that get a pickle."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref

import pytest

pytest.importorskip("msgpack")
pytest.importorskip("zmq")

import zmq
from helpers.serving_policies import ROOT, Echo, observation, process, serving

from lara_adapter import ServingError, ServingTimeout
from lara_adapter.serving import PolicyClient, PolicyServer, pack
from lara_adapter.serving.protocol import client_name

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
LONG = 60  # seconds until a process counts as hanging; no test waits for it


def in_fork(function):
    """Call a function in a forked process; returns what it returns, raises what it raises."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def run():
        try:
            there.send(function())
        except BaseException as error:
            there.send(error)

    child = fork.Process(target=run)
    child.start()
    there.close()
    try:
        assert here.poll(LONG), "the forked process hangs"
        result = here.recv()
        child.join(LONG)
        assert child.exitcode == 0, "the forked process does not end"
    finally:
        child.kill()
        child.join()
        here.close()
    if isinstance(result, BaseException):
        raise result
    return result


def ask(client, value):
    return float(client.get_action(observation(value))[0]["velocity"][0, 0, 0])


@contextlib.contextmanager
def recorder():
    """A server that answers everything; yields its port and the routing ids in the order of the requests."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    port, seen, over = socket.bind_to_random_port("tcp://127.0.0.1"), [], threading.Event()

    def answer():
        while not over.is_set():
            if socket.poll(50):
                address, empty, _ = socket.recv_multipart()
                seen.append(address)
                socket.send_multipart([address, empty, pack({})])

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield port, seen
    finally:
        over.set()
        thread.join()
        socket.close()
        context.term()


@needs_fork
@pytest.mark.parametrize("used", [False, True], ids=["not used before the fork", "used before the fork"])
def test_parent_and_child_are_two_clients_of_the_server(used):
    with recorder() as (port, seen), PolicyClient(port=port) as client:
        if used:
            assert client.ping()
        in_fork(lambda: [client.call_endpoint("ping"), client.call_endpoint("ping")])
        assert client.ping()
        assert in_fork(client.ping)
        assert client.ping()
        *first, child, again, parent, other, last = seen
        assert child == again
        assert {*first, last} == {parent}, "the parent's connection was lost"
        assert len({client_name(child), client_name(parent), client_name(other)}) == 3


@needs_fork
@pytest.mark.parametrize("used_in_child", [False, True])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("end", ["close", "with", "collect"])
def test_the_end_of_a_client_in_the_child_is_not_the_parents(end, used, used_in_child):
    with recorder() as (port, seen):
        box = [PolicyClient(port=port)]  # the only reference
        if used:
            assert box[0].ping()

        def child():
            if used_in_child:
                assert box[0].ping()
            if end == "collect":
                gone = weakref.ref(box.pop())
                gc.collect()
                return gone() is None
            if end == "close":
                box[0].close()
            else:
                with box[0]:
                    pass
            with pytest.raises(ServingError, match="closed"):
                box[0].reset()
            return True

        assert in_fork(child)
        with box[0] as client:
            assert client.ping()
            if used:
                assert seen[0] == seen[-1], "the parent's connection was lost"


@needs_fork
def test_a_closed_client_stays_closed_in_the_child():
    client = PolicyClient()
    client.close()
    with pytest.raises(ServingError, match="closed"):
        in_fork(client.reset)


@needs_fork
@pytest.mark.parametrize("used", [False, True])
def test_the_childs_time_out_holds(used):
    with process() as (server, port), PolicyClient(port=port) as client:
        if used:
            assert ask(client, 1.0) == 2
        server.kill()
        server.wait(10)
        client.timeout_ms = 200

        def child():
            begin = time.monotonic()
            try:
                client.get_action(observation())
            except ServingTimeout:
                return time.monotonic() - begin

        assert 0.2 <= in_fork(child) < 10


class Gated(Echo):
    """It answers when its gate is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def get_action(self, observation, options=None):
        answer = super().get_action(observation, options)
        assert self.gate.wait(LONG)
        return answer


@needs_fork
def test_a_fork_during_a_call_of_another_thread():
    """The thread holds the client's lock, which nobody releases in the child."""
    policy, answers = Gated(), []
    with serving(policy) as server, PolicyClient(port=server.port, timeout_ms=1000 * LONG) as client:
        thread = threading.Thread(target=lambda: answers.append(ask(client, 1.0)))
        thread.start()
        end = time.monotonic() + LONG
        while not policy.calls and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(ServingTimeout):  # the server is busy with the parent's call
            in_fork(lambda: client.call_endpoint("ping", timeout_ms=100))
        in_fork(client.close)
        assert thread.is_alive()
        policy.gate.set()
        thread.join(LONG)
        assert answers == [2.0]
        assert in_fork(lambda: ask(client, 2.0)) == 4
        assert ask(client, 3.0) == 6


@needs_fork
def test_forks_of_a_busy_parent():
    """What a child does to an inherited socket wakes libzmq's threads in the parent, which then abort."""
    with process() as (_, port), PolicyClient(port=port) as client:
        wrong, count, over = [], [0], threading.Event()

        def hammer():
            try:
                while not over.is_set():
                    count[0] += 1
                    if ask(client, float(count[0])) != 2 * count[0]:
                        wrong.append(count[0])
            except BaseException as error:  # a thread would only print it
                wrong.append(error)

        thread = threading.Thread(target=hammer)
        thread.start()
        try:
            for value in range(5):

                def child(value=value):
                    with client:
                        return ask(client, -value)

                assert in_fork(child) == -2 * value
        finally:
            over.set()
            thread.join(LONG)
        assert not thread.is_alive()
        assert not wrong
        assert count[0] > 1


@needs_fork
def test_threads_of_the_child_and_its_own_child():
    with process() as (_, port), PolicyClient(port=port) as client:
        assert ask(client, 1.0) == 2

        def child():
            answers: dict[int, float] = {}
            threads = [threading.Thread(target=lambda i=i: answers.update({i: ask(client, i)})) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return answers, in_fork(lambda: ask(client, 10.0)), ask(client, 11.0)

        assert in_fork(child) == ({0: 0, 1: 2, 2: 4, 3: 6}, 20, 22)
        assert ask(client, 2.0) == 4


class Labels:
    """A dataset whose samples come from a policy server."""

    def __init__(self, client):
        self.client = client

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return ask(self.client, float(index))


@needs_fork
def test_dataloader_workers():
    from torch.utils.data import DataLoader

    with process() as (_, port), PolicyClient(port=port) as client:
        loader = DataLoader(Labels(client), 2, num_workers=2, multiprocessing_context="fork", timeout=LONG)
        for _ in range(2):
            assert ask(client, 1.0) == 2
            assert [batch.tolist() for batch in loader] == [[0, 2], [4, 6], [8, 10]]


@needs_fork
def test_a_child_that_ends_like_any_program():
    """os.fork alone: the interpreter of the child is torn down with what it inherited."""
    code = """
import os, sys
from lara_adapter.serving import PolicyClient, PolicyServer
from helpers.serving_policies import Bare
with PolicyClient(port=int(sys.argv[1])) as client, PolicyServer(Bare(), port=0) as server:
    assert client.ping()
    child = os.fork()
    if child == 0:
        assert client.ping()
        sys.exit(7)  # out of the with block, too
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert client.ping()
"""
    with process() as (_, port):
        run([sys.executable, "-c", code, str(port)])


def run(command):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=LONG, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_fork
def test_a_server_answers_in_its_own_process_only():
    with serving(Echo()) as server, PolicyClient(port=server.port) as client:
        assert ask(client, 1.0) == 2
        with pytest.raises(ServingError, match=f"belongs to process {os.getpid()}, from which process"):
            in_fork(server.run)
        in_fork(server.close)
        in_fork(server.stop)
        assert in_fork(lambda: ask(client, 2.0)) == 4  # of the parent
        assert ask(client, 3.0) == 6


@needs_fork
def test_a_policy_that_forks_and_returns_twice():
    code = """
import os, sys, threading
from lara_adapter import ServingError
from lara_adapter.serving import PolicyClient, PolicyServer
class Forking:
    def get_action(self, observation):
        self.child = os.fork()
        return {}
policy = Forking()
server = PolicyServer(policy, port=0)
def ask():
    with PolicyClient(port=server.port) as client:
        for _ in range(3):
            client.get_action({})
            assert os.waitstatus_to_exitcode(os.waitpid(policy.child, 0)[1]) == 7
    server.stop()
thread = threading.Thread(target=ask, daemon=True)
thread.start()
try:
    server.run()
except ServingError as error:
    assert "was forked" in str(error)
    os._exit(7)
thread.join()
print("served")
"""
    assert run([sys.executable, "-c", code]) == "served\n"


def _ask_elsewhere(client, answers) -> None:
    answers.put(ask(client, 4.0))


def test_a_pickled_client_connects_where_it_arrives():
    spawn = multiprocessing.get_context("spawn")
    with process() as (_, port), PolicyClient(port=port, timeout_ms=1000 * LONG) as client:
        assert ask(client, 1.0) == 2
        answers = spawn.Queue()
        child = spawn.Process(target=_ask_elsewhere, args=(client, answers))
        child.start()
        try:
            assert answers.get(timeout=LONG) == 8
            child.join(LONG)
            assert child.exitcode == 0
        finally:
            child.kill()
            child.join()
        assert ask(client, 2.0) == 4


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_is_another_client(duplicate):
    with recorder() as (port, seen), PolicyClient(port=port, timeout_ms=5000, api_token="x") as client:
        assert client.ping()
        with duplicate(client) as other:
            assert (other.address, other.timeout_ms) == (client.address, 5000)
            assert other.ping()
        assert client.ping()
        assert seen[0] == seen[2]
        assert client_name(seen[1]) != client_name(seen[0])
    with pytest.raises(ServingError, match="closed"):
        duplicate(client).reset()


@pytest.mark.parametrize("duplicate", [copy.copy, pickle.dumps])
def test_a_server_is_neither_copied_nor_pickled(duplicate):
    with PolicyServer(Echo(), port=0) as server, pytest.raises(ServingError, match="make it in the process"):
        duplicate(server)
