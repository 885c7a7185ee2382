"""A policy behind a ZMQ socket: one thread, one request at a time; nothing that a client sends can stop it."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hmac
import inspect
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from ..errors import LaraArgumentError, ServingError
from .address import Address, is_local, parse_address
from .protocol import MAX_MESSAGE_BYTES, client_name, pack, require_zmq, unpack

__all__ = ["PolicyServer"]

logger = logging.getLogger(__name__)

_POLL_MS = 100  # how soon stop() is noticed
_MAX_WAITING = 256  # clients; further requests stay in libzmq, so that a flood does not fill our memory
_HINTS = {
    errno.EADDRINUSE: "choose another port, or 0 for any free one; a process forked from a server keeps its port",
    errno.EADDRNOTAVAIL: "expected an address of this machine, or * for all",
}


@dataclasses.dataclass
class _Endpoint:
    function: Callable[..., Any]
    requires_input: bool

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """Inspected once, not at each request."""
        return inspect.signature(self.function)


class PolicyServer:
    """Answers the requests of :class:`PolicyClient` and of GR00T N1.6's own client.

    Endpoints: `get_action(observation, options)`, `reset(options)`, `get_modality_config`, `ping`, `describe`, and
    `kill` if allowed; `register_endpoint` adds others. Requests are answered one at a time, in the order in which they
    arrive; if one of our clients gives up and asks again, only its newest request is processed. A request that fails is
    answered with `{"error": ...}`, and the server continues.

    The policy needs `get_action(observation)` or `get_action(observation, options)`, which returns the action or
    (action, info). The action is a mapping of arrays, an array or a tensor; NaN or infinity in it is an error and never
    reaches a robot. `reset()`, `reset(options)` and `get_modality_config()` are called if the policy has them. All
    clients share the policy: one that keeps the state of an episode can serve only one client. A policy with `reset` is
    taken for one, unless it has `stateful = False`; `describe` says so, and `lara eval --workers` refuses it.

    Anyone who reaches the port can use the policy, so by default only this machine can. Messages, and the token in them,
    are not encrypted: use ssh or a VPN on a network that others use.

    A server runs only in the process that made it: not after a fork, and it cannot be pickled.
    """

    def __init__(
        self, policy: Any, host: str = "127.0.0.1", port: int | None = None, *, api_token: str | None = None,
        allow_kill: bool = False, max_message_bytes: int = MAX_MESSAGE_BYTES, description: str | None = None,
    ) -> None:  # fmt: skip
        """Bind the socket; requests are answered by :meth:`run`.

        Args:
            policy: see above.
            host: name, address or network interface of this machine to listen on; `*` or `::` is every network, IPv4 and
                IPv6, `0.0.0.0` every network, IPv4 only. tcp:// and the port may be part of it: [::1]:5555.
            port: TCP port; 0: any free one; None: the one in host, else 5555.
            api_token: token that every request must carry; compared in constant time.
            allow_kill: whether a client may stop the server.
            max_message_bytes: libzmq closes the connection of a client that sends more.
            description: what `describe` calls the policy; None: its class.

        Raises:
            LaraArgumentError: the policy has no `get_action`, an argument is out of range, or host is not an address.
            ServingError: the address cannot be listened on.
            HostNotInstalled: pyzmq or msgpack is missing.
        """
        if not callable(getattr(policy, "get_action", None)):
            raise LaraArgumentError(f"policy: a {type(policy).__name__} has no get_action(observation)")
        address = parse_address(host, port, listen=True)
        if max_message_bytes < 1024:
            raise LaraArgumentError(f"max_message_bytes={max_message_bytes} must be at least 1024")
        if api_token is not None and not (isinstance(api_token, str) and api_token):
            raise LaraArgumentError("api_token: a string of at least one character is expected, or None")
        self.policy, self.description = policy, description or type(policy).__name__
        self._takes_options = _accepts(policy.get_action, "options")
        self._token = None if api_token is None else api_token.encode()
        self._process, self._stopped = os.getpid(), False
        self._endpoints: dict[str, _Endpoint] = {}
        self.register_endpoint("get_action", self._get_action)
        self.register_endpoint("reset", self._reset)
        self.register_endpoint("get_modality_config", getattr(policy, "get_modality_config", dict), False)
        self.register_endpoint("ping", lambda: {"status": "ok", "message": "Server is running"}, False)
        self.register_endpoint("describe", self._describe, False)
        if allow_kill:
            self.register_endpoint("kill", self.stop, False)
        self._zmq, _ = require_zmq()
        self._bind(address, max_message_bytes)
        if api_token is None and not is_local(self._socket.getsockopt_string(self._zmq.LAST_ENDPOINT)):
            logger.warning(
                "the policy can be reached from other machines (host=%r), and no api_token is required", host
            )

    def _bind(self, address: Address, max_message_bytes: int) -> None:
        zmq = self._zmq
        endpoint, is_ipv6 = address.to_bind()
        self._context = zmq.Context()
        self._socket = socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, is_ipv6)
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        socket.setsockopt(zmq.RCVHWM, 4)  # per connection; a client has one request in flight
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an answer to a client that left is an error, not dropped silently
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # a client that vanished silently is forgotten
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 20_000)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            hint = _HINTS.get(error.errno)
            raise ServingError(f"{address} cannot be listened on: {error}" + (f"; {hint}" if hint else "")) from error
        port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.host, self.port, self.address = address.host, port, str(Address(address.host, port))

    def register_endpoint(self, name: str, function: Callable[..., Any], requires_input: bool = True) -> None:
        """Answer requests for `name` by `function(**data)`, or by `function()` where it requires no input."""
        self._endpoints[name] = _Endpoint(function, requires_input)

    def run(self) -> None:
        """Answer until :meth:`stop` (from any thread or a signal handler) or, if allowed, a client's `kill`.

        Raises:
            ServingError: this is a process forked from the one that made the server.
        """
        self._check_process()
        zmq, waiting, busy = self._zmq, dict[bytes, list[bytes]](), 0.0
        logger.info("serving %s on %s", self.description, self.address)
        try:
            while not self._stopped:
                self._receive(waiting, patient=busy > 0.05)
                if not waiting:
                    continue
                begin = time.monotonic()
                *envelope, message = waiting.pop(next(iter(waiting)))
                answer = self._answer(message)
                self._check_process()  # a policy may fork
                try:
                    self._socket.send_multipart([*envelope, answer], flags=zmq.DONTWAIT)
                except zmq.ZMQError as error:  # the client left, or does not read
                    logger.info("an answer could not be sent: %s", error)
                busy = time.monotonic() - begin
        finally:
            self.close()

    def _receive(self, waiting: dict[bytes, list[bytes]], patient: bool) -> None:
        """Read the requests that have arrived. A client's second request replaces its first, which it has given up.

        After a long answer (`patient`) it also waits for what libzmq is still delivering, to find the newest requests.
        """
        zmq = self._zmq
        patient = patient and bool(self._socket.poll(0))
        if not waiting and not self._socket.poll(_POLL_MS):
            return
        while len(waiting) < _MAX_WAITING:
            try:
                address, *frames = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                if patient and self._socket.poll(1):
                    continue
                return
            # [request id of a correlating REQ,] empty, message: a REQ socket sends nothing else
            if len(frames) not in (2, 3) or frames[-2]:
                logger.warning("dropped a message of %d frames, which no REQ socket sends", len(frames))
                continue
            name = client_name(address)
            waiting.pop(name, None)
            waiting[name] = [address, *frames]

    def stop(self) -> dict[str, str]:
        """Make :meth:`run` return after the present request."""
        self._stopped = True
        return {"status": "ok", "message": "Server stops"}

    def close(self) -> None:
        """Release the port; :meth:`run` does so when it returns. In a forked process the server goes on."""
        self._stopped = True
        if self._process == os.getpid():
            self._socket.close(linger=1000)  # time for the last answer
            self._context.term()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ServingError(
                f"this server belongs to process {self._process}, from which process {os.getpid()} was forked: make "
                "the PolicyServer in the process that runs it"
            )

    def __getstate__(self) -> NoReturn:
        raise ServingError("a PolicyServer cannot be copied or pickled: make it in the process that runs it")

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, message: bytes) -> bytes:
        """The reply to any message."""
        try:
            return pack(self._call(message))
        except ServingError as error:
            logger.warning("refused: %s", error)
            text = str(error)
        except Exception as error:  # the policy's: the traceback is logged, the client gets one line
            logger.exception("the policy failed")
            text = f"{type(error).__name__}: {error}"
        return pack({"error": text[:2000].encode(errors="replace").decode()})

    def _call(self, message: bytes) -> Any:
        request = unpack(message)
        if not isinstance(request, dict):
            raise ServingError(f"a request is a map with the key endpoint, but got a {type(request).__name__}")
        token = request.get("api_token")
        offered = token.encode(errors="replace") if isinstance(token, str) else b""
        if self._token is not None and not hmac.compare_digest(offered, self._token):
            raise ServingError("Unauthorized: Invalid API token")
        name = request.get("endpoint", "get_action")
        endpoint = self._endpoints.get(name) if isinstance(name, str) else None
        if endpoint is None:
            raise ServingError(f"Unknown endpoint: {str(name)[:100]!r}; known are {', '.join(sorted(self._endpoints))}")
        if not endpoint.requires_input:
            return endpoint.function()
        data = {} if request.get("data") is None else request["data"]
        if not isinstance(data, dict):
            raise ServingError(f"{name}: data is a map of arguments, but got a {type(data).__name__}")
        try:
            endpoint.signature.bind(**data)
        except TypeError as error:
            raise ServingError(f"{name}: {error}; got {sorted(map(str, data))[:10]}") from None
        return endpoint.function(**data)

    def _get_action(self, observation: Any, options: dict[str, Any] | None = None) -> list[Any]:
        if options is not None and not self._takes_options:
            raise ServingError(f"{self.description}.get_action takes no options, but got {sorted(options)}")
        result = self.policy.get_action(observation, **({"options": options} if self._takes_options else {}))
        with_info = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
        action, info = result if with_info else (result, {})
        _check_finite(action, "action")
        return [action, info]

    def _reset(self, options: dict[str, Any] | None = None) -> Any:
        reset = getattr(self.policy, "reset", None)
        if reset is None:
            return {}
        result = reset(options=options) if _accepts(reset, "options") else reset()
        return {} if result is None else result

    def _describe(self) -> dict[str, Any]:
        from .. import __version__

        stateful = bool(getattr(self.policy, "stateful", hasattr(self.policy, "reset")))
        return {
            "server": f"lara-adapter {__version__}", "policy": self.description, "options": self._takes_options,
            "stateful": stateful,
        }  # fmt: skip


def _accepts(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_finite(value: Any, where: str) -> None:
    """Refuse NaN and infinity anywhere in an action."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_finite(entry, f"{where}[{key!r}]")
        return
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        value = value.detach().cpu().float().numpy()
    array = np.asarray(value)
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        raise ServingError(
            f"the policy's {where} is not finite in {int((~np.isfinite(array)).sum())} of {array.size} places"
        )
