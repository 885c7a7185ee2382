"""One server and two client processes for a whole run of tests; each test uses repositories of its own."""

from __future__ import annotations

import pytest
from hub.client import Client
from hub.server import HubServer


@pytest.fixture(scope="session")
def _server():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def _home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture
def hub(_server):
    _server.forget()
    yield _server
    _server.forget()
    _server.part_size = 2**40


@pytest.fixture(scope="session")
def client(_server, _home):
    """A user's program, logged in as alice, with one trained adapter "a"."""
    with Client(_server.url, _home) as process:
        process("make", name="a", steps=2)
        yield process


@pytest.fixture(scope="session")
def offline(_server, _home):
    """Another program on the same machine: it shares the cache, and may not use the network."""
    with Client(_server.url, _home, offline=True) as process:
        yield process


@pytest.fixture
def acting_as(client):
    """Log in as another user, or as nobody."""
    yield lambda token: client("environ", HF_TOKEN=token)
    client("environ", HF_TOKEN="hf_alice")
