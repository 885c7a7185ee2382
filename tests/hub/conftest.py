from hub.fixtures import _home, _server, acting_as, client, hub, offline  # noqa: F401
