"""A client for a policy server: every call ends in time, and after any failure the client can be used again."""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Any

from ..errors import LaraArgumentError, ServingError, ServingTimeout
from .address import Address, parse_address
from .protocol import MAX_MESSAGE_BYTES, ModalityConfig, pack, require_zmq, routing_id, unpack

__all__ = ["PolicyClient"]

_RETRY_S = 0.1  # between two tries to reach a server that closes the connection at once


class _ErrorReply(ServingError):
    """The server answered with an error; every other ServingError is about the connection."""


class PolicyClient:
    """Client of a :class:`PolicyServer`, or of GR00T N1.6's server.

    It connects on first use, and again after a time-out or a lost connection. A failed call is not repeated: the robot
    has moved meanwhile. Threads may share a client; their calls wait for each other. In another process, after a fork or
    from a pickle, the client has a connection of its own; a pickle contains the token.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int | None = None, *, timeout_ms: int = 15_000, api_token: str | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:  # fmt: skip
        """Set up; nothing is sent.

        Args:
            host: name or address of the server: robot, 192.168.1.5, ::1, fe80::1%eth0; tcp:// and the port may be part of
                it: robot:5555, [::1]:5555. Of a name with IPv4 and IPv6 addresses the IPv4 address is used.
            port: of the server; None: the one in host, else 5555.
            timeout_ms: how long a call waits for its answer, connecting included.
            api_token: the server's token.
            max_message_bytes: larger messages are neither sent nor accepted.

        Raises:
            LaraArgumentError: a number is out of range, host is not an address, or it and port name different ports.
            HostNotInstalled: pyzmq or msgpack is missing.
        """
        if timeout_ms <= 0:
            raise LaraArgumentError(f"timeout_ms={timeout_ms} must be above 0")
        require_zmq()
        self._server = parse_address(host, port)
        self.address, self.timeout_ms = str(self._server), timeout_ms
        self._token, self._limit = api_token, max_message_bytes
        self._connections: dict[int, _Connection] = {}  # by process id: a fork inherits its parent's
        self._closed = False

    def get_action(self, observation: Any, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Ask for an action.

        Args:
            observation: input of the policy; GR00T's layout is `{"video": {view: uint8 [B, T, H, W, 3]}, "state":
                {key: float32 [B, T, D]}, "language": {key: [[str]] * B}}`.
            options: of the policy.

        Returns:
            The action, in GR00T's layout `{key: float32 [B, H, D]}`, and the policy's further information.

        Raises:
            ServingTimeout: no answer in time.
            ServingError: the server answered with an error or went away.
        """
        answer = self.call_endpoint("get_action", {"observation": observation, "options": options})
        if not (isinstance(answer, list) and len(answer) == 2):
            raise ServingError(f"{self.address} answered get_action with a {type(answer).__name__}, not [action, info]")
        return answer[0], answer[1]

    def reset(self, options: dict[str, Any] | None = None) -> Any:
        """Tell the policy that an episode begins."""
        return self.call_endpoint("reset", {"options": options})

    def get_modality_config(self) -> dict[str, ModalityConfig]:
        """Inputs and outputs of the policy; empty if it does not declare them."""
        answer: dict[str, ModalityConfig] = self.call_endpoint("get_modality_config")
        return answer

    def describe(self) -> dict[str, Any]:
        """What is served; empty from GR00T's own server, which does not have this endpoint."""
        try:
            answer: dict[str, Any] = self.call_endpoint("describe")
        except _ErrorReply as error:
            if "Unknown endpoint" in str(error):
                return {}
            raise
        return answer

    def ping(self) -> bool:
        """Whether the server answers."""
        try:
            self.call_endpoint("ping")
        except ServingError:
            return False
        return True

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Wait for a server that is still loading its policy, also behind a tunnel, which closes connections until then.

        Raises:
            ServingTimeout: it does not answer within that time.
            ServingError: it answers with an error (a wrong token).
        """
        end = time.monotonic() + seconds
        while True:
            try:
                left = end - time.monotonic()
                self.call_endpoint("ping", timeout_ms=max(1, min(1000, int(1000 * left))))
                return
            except _ErrorReply:
                raise
            except ServingError as error:
                if self._closed:
                    raise
                if time.monotonic() + _RETRY_S >= end:
                    why = "" if isinstance(error, ServingTimeout) else f"; last error: {error}"
                    raise ServingTimeout(
                        f"no server answers at {self.address} within {seconds:g} s: start one (lara serve), or name its "
                        f"address{why}"
                    ) from error
                time.sleep(_RETRY_S)

    def kill_server(self) -> None:
        """Stop the server, if it allows that."""
        self.call_endpoint("kill")

    def call_endpoint(
        self, endpoint: str, data: dict[str, Any] | None = None, requires_input: bool = True, *,
        timeout_ms: int | None = None,
    ) -> Any:  # fmt: skip
        """Call any endpoint, and return what it returned.

        Args:
            endpoint: its name.
            data: its arguments, if any.
            requires_input: whether to send `data`, as in GR00T's client.
            timeout_ms: for this call; None: the client's.

        Raises:
            ServingTimeout: no answer in time.
            ServingError: the message is too large or cannot be sent, or the server answered with an error or went away.
        """
        request: dict[str, Any] = {"endpoint": endpoint}
        if requires_input and data is not None:
            request["data"] = data
        if self._token is not None:
            request["api_token"] = self._token
        message = pack(request)
        if len(message) > self._limit:
            raise ServingError(
                f"{endpoint}: the message has {len(message)} bytes, above max_message_bytes={self._limit}; send smaller "
                "images, or raise the limit here and at the server"
            )
        connection = self._connection()
        with connection.lock:
            if self._closed:
                raise ServingError("this client is closed")
            answer = unpack(connection.exchange(endpoint, message, timeout_ms or self.timeout_ms))
        if isinstance(answer, dict) and "error" in answer:
            raise _ErrorReply(f"{self.address} answered {endpoint} with an error: {answer['error']}")
        return answer

    def _connection(self) -> _Connection:
        """The connection of this process.

        A connection that a fork inherited is left alone, its lock included: libzmq's threads are not in the child, and
        its descriptors are the parent's too. pyzmq does not destroy what another process made.
        """
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, _Connection(self._server, self._limit))
        return self._connections[process]

    def close(self) -> None:
        """Close the connection; the client cannot be used again. In a forked process, the parent's is not closed."""
        connection = self._connection()
        with connection.lock:
            self._closed = True
            connection.close()

    def __getstate__(self) -> dict[str, Any]:  # also of copy.copy
        return {**self.__dict__, "_connections": {}}

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Connection:
    """The connection of one process; its owner holds `lock` while it uses it."""

    def __init__(self, server: Address, limit: int) -> None:
        self.lock = threading.Lock()
        self._server, self._limit = server, limit
        self._name, self._count = uuid.uuid4().hex, 0  # the name tells the server that it is the same client
        self._zmq, _ = require_zmq()
        self._context: Any = None
        self._socket: Any = None
        self._monitor: Any = None

    def exchange(self, endpoint: str, message: bytes, timeout_ms: int) -> bytes:
        """Send a request, and return the answer."""
        zmq = self._zmq
        end = time.monotonic() + timeout_ms / 1000
        try:
            if self._socket is not None and self._monitor.poll(0):  # lost since the last call
                self._disconnect()
            if self._socket is None:
                self._connect(timeout_ms / 1000)
            self._socket.send(message)
            while (left := end - time.monotonic()) > 0:
                ready = dict(self._poller.poll(max(1, int(1000 * left))))
                if self._socket in ready:
                    frames: list[bytes] = self._socket.recv_multipart()
                    return frames[0]
                if self._monitor in ready and self._is_cut():
                    raise ServingError(
                        f"{self._server} closed the connection before it answered {endpoint}: it stopped, or refuses "
                        f"messages of {len(message)} bytes"
                    )
        except zmq.ZMQError as error:
            self._disconnect()
            raise ServingError(f"{endpoint} at {self._server}: {error}") from error
        except BaseException:  # ours, or an interrupt: the socket still waits for an answer
            self._disconnect()
            raise
        self._disconnect()
        raise ServingTimeout(
            f"{self._server} gave no answer to {endpoint} within {timeout_ms} ms: it is not running, not "
            "reachable, or busy for longer (raise timeout_ms)"
        )

    def _connect(self, seconds: float) -> None:
        zmq = self._zmq
        address, is_ipv6 = self._server.to_connect(seconds)
        if self._context is None:
            self._context = zmq.Context()
        self._socket = socket = self._context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, is_ipv6)
        socket.setsockopt(zmq.MAXMSGSIZE, self._limit)
        self._count += 1
        socket.setsockopt(zmq.IDENTITY, routing_id(self._name, self._count))
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2_000)  # a peer that vanished silently is a lost connection
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        socket.connect(address)

    def _is_cut(self) -> bool:
        from zmq.utils.monitor import recv_monitor_message

        recv_monitor_message(self._monitor)
        return not self._socket.poll(0)  # the answer may have come just before

    def _disconnect(self) -> None:
        if self._socket is not None:
            socket, self._socket = self._socket, None
            monitor, self._monitor = self._monitor, None
            socket.disable_monitor()
            if monitor is not None:  # None: no descriptor was left for it
                monitor.close(0)
            socket.close(0)

    def close(self) -> None:
        """Close the socket and what belongs to it."""
        self._disconnect()
        if self._context is not None:
            context, self._context = self._context, None
            context.term()
