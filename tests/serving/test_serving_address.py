"""Addresses as people write them: one reading for client, server and command line, on IPv4 and IPv6."""

from __future__ import annotations

import socket as sockets
import threading

import pytest

pytest.importorskip("msgpack")
pytest.importorskip("psutil")
pytest.importorskip("zmq")

import psutil
from helpers.serving_policies import Echo, observation, serving

from lara_adapter import LaraArgumentError, ServingError, ServingTimeout, cli
from lara_adapter.serving import PolicyClient, PolicyServer
from lara_adapter.serving.address import parse_address

SERVERS_ONLY = ["*", "0.0.0.0", "::", "[::]", "tcp://*", "tcp://0.0.0.0:5555"]


def _has_ipv6() -> bool:
    try:
        with sockets.socket(sockets.AF_INET6) as socket:
            socket.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


def ask(host, port=None):
    with PolicyClient(host, port, timeout_ms=20_000) as client:
        return client.get_action(observation(2.0))[0]["velocity"][0, 0, 0] == 4


@pytest.mark.parametrize("listen", [False, True], ids=["client", "server"])
@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("localhost", None, "tcp://localhost:5555"),
        ("localhost", 6000, "tcp://localhost:6000"),
        (" robot.local\n", None, "tcp://robot.local:5555"),
        ("robot:6000", None, "tcp://robot:6000"),
        ("robot:6000", 6000, "tcp://robot:6000"),
        ("robot.", None, "tcp://robot.:5555"),
        ("my_robot-2", None, "tcp://my_robot-2:5555"),
        ("bücher.example", None, "tcp://bücher.example:5555"),
        ("127.0.0.1", None, "tcp://127.0.0.1:5555"),
        ("192.168.1.5:6000", None, "tcp://192.168.1.5:6000"),
        ("tcp://robot", None, "tcp://robot:5555"),
        ("TCP://robot:6000/", None, "tcp://robot:6000"),
        ("::1", 6000, "tcp://[::1]:6000"),
        ("[::1]", None, "tcp://[::1]:5555"),
        ("[::1]:6000", None, "tcp://[::1]:6000"),
        ("tcp://[2001:db8::7]:6000", None, "tcp://[2001:db8::7]:6000"),
        ("fe80::1%eth0", None, "tcp://[fe80::1%eth0]:5555"),
        ("[fe80::1%eth0]:6000", None, "tcp://[fe80::1%eth0]:6000"),
        ("::ffff:192.168.1.5", None, "tcp://[::ffff:192.168.1.5]:5555"),
    ],
)
def test_addresses(host, port, expected, listen):
    assert str(parse_address(host, port, listen=listen)) == expected
    assert listen or PolicyClient(host, port).address == expected


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("", None, "host='': there is no name or address in it; expected a name or an address: robot"),
        (" \n", None, "there is no name or address"),
        ("tcp://", None, "there is no name or address"),
        (":5555", None, "there is no name or address"),
        ("http://robot:80", None, "not http; expected tcp://HOST:PORT, or HOST alone"),
        ("ipc:///tmp/robot", None, "not ipc"),
        ("robot:6000", 5555, "host='robot:6000' and port=5555 name different ports; leave one of them out"),
        ("[::1]:6000", 5555, "name different ports"),
        ("robot:", None, "'' after the colon is not a port"),
        ("robot:http", None, "'http' after the colon is not a port"),
        ("robot:٥٥", None, "is not a port"),
        ("robot:99999", None, r"host='robot:99999': port 99999 is not in \d\.\.65535"),
        ("robot", 65536, r"port=65536 is not in \d\.\.65535"),
        ("robot", -1, "port=-1 is not in"),
        ("robot", "5555", "port='5555' is a str, but an int is expected"),
        ("robot", True, "port=True is a bool"),
        (None, None, "host: got a NoneType"),
        (b"robot", None, "host: got a bytes"),
        ("my robot", None, "'my robot' is neither a name nor an address"),
        ("user@robot", None, "is neither a name nor an address"),
        ("robot/policy", None, "is neither a name nor an address"),
        ("eth0;robot", None, "is neither a name nor an address"),
        ("a..b", None, "is neither a name nor an address"),
        ("5555", None, "is neither a name nor an address"),
        ("10.0.0.256", None, "is neither a name nor an address"),
        ("robot:1:2", None, "is neither HOST nor HOST:PORT; an IPv6 address with a port needs brackets"),
        ("1:2:3:4:5:6:7:8:5555", None, "needs brackets"),
        ("[::1", None, "needs brackets"),
        ("[robot]:5555", None, "'robot' in brackets is not an IPv6 address"),
        ("fe80::1", None, "a link-local address needs its network interface, as in fe80::1%eth0"),
    ],
)
def test_what_is_not_an_address(host, port, message):
    for make in (PolicyClient, lambda *address: PolicyServer(Echo(), *address)):
        with pytest.raises(LaraArgumentError, match=message):
            make(host, port)


@pytest.mark.parametrize("host", SERVERS_ONLY)
def test_what_only_a_server_can_have(host):
    assert parse_address(host, listen=True).port == 5555
    with pytest.raises(LaraArgumentError, match="a client names one machine"):
        PolicyClient(host)
    with pytest.raises(LaraArgumentError, match=r"port=0 is not in 1\.\.65535"):
        PolicyClient(port=0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "tcp://localhost", "0.0.0.0", "*"])
def test_ipv4(host):
    with serving(Echo(), host=host) as server:
        assert server.address == f"tcp://{server.host}:{server.port}"
        assert ask(f"127.0.0.1:{server.port}")
        assert ask("localhost", server.port)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "[::1]", "tcp://[::1]:0"])
def test_ipv6(host):
    with serving(Echo(), host=host) as server:
        assert (server.host, server.address) == ("::1", f"tcp://[::1]:{server.port}")
        assert ask("::1", server.port)
        assert ask(f"[::1]:{server.port}")
        assert ask(server.address)


@needs_ipv6
@pytest.mark.parametrize("host", ["*", "::"])
def test_every_network_is_ipv4_and_ipv6(host):
    with serving(Echo(), host=host) as server:
        assert ask("127.0.0.1", server.port)
        assert ask("::1", server.port)


@needs_ipv6
def test_a_link_local_address():
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    local = [address for address in found if address.startswith("fe80") and "%" in address]
    if not local:
        pytest.skip("no network interface has a link-local address")
    with serving(Echo(), host=local[0]) as server:
        assert ask(local[0], server.port)
    with pytest.raises(ServingError, match="nowhere0' cannot be resolved"):
        ask("fe80::1%nowhere0")


def test_a_network_interface():
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    loopback = [name for name in addresses if "127.0.0.1" in addresses[name]]
    if not loopback or loopback[0] not in (name for _, name in sockets.if_nameindex()):
        pytest.skip("the loopback interface has no name here")
    with serving(Echo(), host=loopback[0]) as server:
        assert ask("127.0.0.1", server.port)


@pytest.fixture
def names(monkeypatch):
    """Names that this test's name server knows: {name: addresses}."""
    known, real = {}, sockets.getaddrinfo

    def look_up(host, *args, **kwargs):
        if host in known and not known[host]:
            raise sockets.gaierror(sockets.EAI_NONAME, "Name or service not known")
        return [entry for address in known.get(host, [host]) for entry in real(address, *args, **kwargs)]

    monkeypatch.setattr(sockets, "getaddrinfo", look_up)
    return known


@needs_ipv6
def test_a_name_with_both_kinds_of_addresses_and_one_with_ipv6_alone(names):
    names.update(both=["::1", "127.0.0.1"], my_robot=["::1"])
    with serving(Echo(), host="both") as server:
        assert ask("127.0.0.1", server.port)
        assert ask("both", server.port)
    with serving(Echo(), host="my_robot") as server:
        assert ask("::1", server.port)
        assert ask("my_robot", server.port)


def test_an_unknown_name_is_said_at_once_and_can_be_waited_for(names):
    names["robot"] = []
    with serving(Echo()) as server, PolicyClient("robot", server.port) as client:
        message = "host='robot' cannot be resolved: .*Name or service not known; check the spelling"
        with pytest.raises(ServingError, match=message) as error:
            client.reset()
        assert not isinstance(error.value, ServingTimeout)
        assert not client.ping()
        with pytest.raises(ServingTimeout, match="no server answers at tcp://robot"):
            client.wait_until_ready(0.3)
        threading.Timer(0.3, names.update, [{"robot": ["127.0.0.1"]}]).start()
        client.wait_until_ready(30)
    names["robot"] = []
    with pytest.raises(ServingError, match="cannot be resolved"):
        PolicyServer(Echo(), "robot", 0)


def test_a_machine_without_ipv6(monkeypatch):
    real = sockets.socket

    def create(family=sockets.AF_INET, *args, **kwargs):
        if family == sockets.AF_INET6:
            raise OSError("Address family not supported by protocol")
        return real(family, *args, **kwargs)

    monkeypatch.setattr(sockets, "socket", create)
    message = r"host='::1': this machine has no IPv6 \(Address family not supported.*\); give an IPv4 address"
    with pytest.raises(ServingError, match=message):
        PolicyServer(Echo(), "::1", 0)
    with pytest.raises(ServingError, match=message):
        ask("::1")


def test_a_name_server_that_does_not_answer(monkeypatch):
    over = threading.Event()

    def look_up(*_, **__):
        over.wait(60)
        raise sockets.gaierror(sockets.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(sockets, "getaddrinfo", look_up)
    with PolicyClient("robot", timeout_ms=100) as client:
        with pytest.raises(ServingTimeout, match=r"host='robot' was not resolved within 0\.1 s"):
            client.reset()
        assert not over.is_set()
    over.set()


def test_what_cannot_be_listened_on():
    with PolicyServer(Echo(), port=0) as first, pytest.raises(ServingError, match=r"in use.*; choose another port"):
        PolicyServer(Echo(), port=first.port)
    with pytest.raises(ServingError, match=r"expected an address of this machine, or \* for all"):
        PolicyServer(Echo(), "203.0.113.1", 0)  # reserved for documentation: nobody's


@pytest.mark.parametrize(
    ("host", "warned"),
    [("localhost", False), ("127.0.0.2", False), ("*", True), ("0.0.0.0", True)]
    + [pytest.param(host, warned, marks=needs_ipv6) for host, warned in [("[::1]", False), ("::", True)]],
)
def test_only_a_server_that_others_can_reach_is_warned_of(host, warned, caplog):
    if host == "127.0.0.2":
        try:
            with sockets.socket() as socket:
                socket.bind((host, 0))
        except OSError:
            pytest.skip("127.0.0.2 is not an address of this machine")
    with PolicyServer(Echo(), host, 0):
        assert ("can be reached from other machines" in caplog.text) is warned


def make_echo() -> Echo:
    return Echo()


@pytest.mark.parametrize(("host", "address"), [("localhost:0", "localhost"), ("*:0", "*"), ("[::1]:0", "[::1]")])
def test_lara_serve_prints_the_address(host, address, capsys, monkeypatch):
    pytest.importorskip("tyro")
    if address == "[::1]" and not _has_ipv6():
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(PolicyServer, "run", PolicyServer.close)
    assert cli.main(["serve", f"{__name__}:make_echo", "--host", host]) == 0
    assert capsys.readouterr().out.startswith(f"serving {__name__}:make_echo on tcp://{address}:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", f"{__name__}:nothing", "--host", "http://robot"], "the protocol is ZMQ over TCP, not http"),
        (["serve", f"{__name__}:nothing", "--host", "robot:6000", "--port", "6001"], "name different ports"),
        (["eval", "pick", "--output", "out", "--host", "robot:6000", "--port", "6001"], "name different ports"),
        (["eval", "pick", "--output", "out", "--host", "*"], "only a server can listen"),
    ],
)
def test_the_command_line_refuses_an_address_before_it_loads_anything(arguments, message, capsys, monkeypatch):
    pytest.importorskip("tyro")
    monkeypatch.setattr("lara_adapter.cli.evaluate.open_simulator", lambda *_, **__: pytest.fail("it was opened"))
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
