"""Addresses as people write them, for both ends of a connection."""

from __future__ import annotations

import dataclasses
import ipaddress
import queue
import re
import socket
import threading

from ..errors import LaraArgumentError, ServingError, ServingTimeout

__all__ = ["Address", "parse_address"]

_DEFAULT_PORT = 5555
_EXPECTED = "expected a name or an address: robot, 192.168.1.5, ::1, fe80::1%eth0, robot:5555, [::1]:5555"
_WITH_PORT = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?")
_NAME = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?")  # also my_host, which a strict reading of RFC 952 refuses


@dataclasses.dataclass(frozen=True)
class Address:
    """A TCP address; `str()` of it is tcp://robot:5555 or tcp://[::1]:5555.

    Attributes:
        host: a name, an IPv4 or IPv6 address without brackets; `*`: every network of this machine.
        port: 0: any free one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{_bracketed(self.host)}:{self.port}"

    def to_bind(self) -> tuple[str, bool]:
        """The endpoint for ZMQ's bind, and whether it needs ZMQ's option IPV6.

        Raises:
            ServingError: the name is unknown, or this machine has no IPv6.
        """
        port = self.port or "*"
        if self.host == "*":
            return f"tcp://*:{port}", True
        if _as_ip(self.host) is None and self.host in (name for _, name in socket.if_nameindex()):
            return f"tcp://{self.host}:{port}", False
        host, is_ipv6 = _look_up(self)
        return f"tcp://{host}:{port}", is_ipv6

    def to_connect(self, seconds: float) -> tuple[str, bool]:
        """The endpoint for ZMQ's connect, and whether it needs ZMQ's option IPV6.

        Raises:
            ServingError: the name is unknown, or this machine has no IPv6.
            ServingTimeout: no name server answers within that time.
        """
        if _as_ip(self.host):
            host, is_ipv6 = _look_up(self)
            return f"tcp://{host}:{self.port}", is_ipv6
        found: queue.SimpleQueue[tuple[str, bool] | ServingError] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                found.put(_look_up(self))
            except ServingError as error:
                found.put(error)

        threading.Thread(target=look_up, daemon=True).start()  # getaddrinfo has no timeout
        try:
            result = found.get(timeout=seconds)
        except queue.Empty:
            raise ServingTimeout(
                f"host={self.host!r} was not resolved within {seconds:g} s: no name server answers; give the address"
            ) from None
        if isinstance(result, ServingError):
            raise result
        return f"tcp://{result[0]}:{self.port}", result[1]


def parse_address(host: str, port: int | None = None, *, listen: bool = False) -> Address:
    """Read an address as people write it.

    Args:
        host: a name or an address, also with tcp:// and with a port.
        port: None: the one in `host`, else 5555.
        listen: for a server, which may also have `*`, `0.0.0.0`, `::` and port 0.

    Raises:
        LaraArgumentError: it is not an address, or `host` and `port` name different ports.
    """
    if not isinstance(host, str):
        raise LaraArgumentError(f"host: got a {type(host).__name__}, but a string is expected, such as '127.0.0.1'")
    scheme, separator, rest = host.strip().partition("://")
    if not separator:
        rest = scheme
    elif scheme.lower() != "tcp":
        raise LaraArgumentError(
            f"host={host!r}: the protocol is ZMQ over TCP, not {scheme}; expected tcp://HOST:PORT, or HOST alone"
        )
    else:
        rest = rest.removesuffix("/")
    bare, written = _split_port(host, rest)
    _check_host(host, bare, listen)
    if port is not None and (isinstance(port, bool) or not isinstance(port, int)):
        raise LaraArgumentError(f"port={port!r} is a {type(port).__name__}, but an int is expected")
    if None not in (port, written) and port != written:
        raise LaraArgumentError(f"host={host!r} and port={port} name different ports; leave one of them out")
    chosen = written if port is None else port
    chosen = _DEFAULT_PORT if chosen is None else chosen
    lowest = 0 if listen else 1
    if not lowest <= chosen <= 65535:
        where = f"port={chosen}" if port is not None else f"host={host!r}: port {chosen}"
        raise LaraArgumentError(f"{where} is not in {lowest}..65535")
    return Address(bare, chosen)


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach an endpoint that ZMQ reports, such as tcp://127.0.0.1:5555."""
    ip = _as_ip(endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]"))
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool(ip and (mapped or ip).is_loopback)


def _split_port(host: str, text: str) -> tuple[str, int | None]:
    if _as_ip(text):
        return text, None
    match = _WITH_PORT.fullmatch(text)
    if match is None or ":" in (match["port"] or ""):
        raise LaraArgumentError(
            f"host={host!r} is neither HOST nor HOST:PORT; an IPv6 address with a port needs brackets, as in [::1]:5555"
        )
    bare, port = match["host"], match["port"]
    if bare.startswith("["):
        bare = bare[1:-1]
        if not isinstance(_as_ip(bare), ipaddress.IPv6Address):
            raise LaraArgumentError(f"host={host!r}: {bare!r} in brackets is not an IPv6 address; {_EXPECTED}")
    if port is None:
        return bare, None
    if not re.fullmatch("[0-9]{1,5}", port):
        raise LaraArgumentError(f"host={host!r}: {port!r} after the colon is not a port; {_EXPECTED}")
    return bare, int(port)


def _check_host(host: str, bare: str, listen: bool) -> None:
    ip, why = _as_ip(bare), ""
    if bare == "*" or (ip and ip.is_unspecified):
        if not listen:
            why = "only a server can listen on every network; a client names one machine, 127.0.0.1 for this one"
    elif isinstance(ip, ipaddress.IPv6Address):
        if ip.is_link_local and not ip.scope_id:
            why = f"a link-local address needs its network interface, as in {bare}%eth0"
    elif not bare:
        why = f"there is no name or address in it; {_EXPECTED}" + ("; *: every network" if listen else "")
    elif ip is None and (not _NAME.fullmatch(bare) or bare.rstrip(".").rpartition(".")[2].isdecimal()):  # 10.0.0.256
        why = f"{bare!r} is neither a name nor an address; {_EXPECTED}"
    if why:
        raise LaraArgumentError(f"host={host!r}: {why}")


def _look_up(address: Address) -> tuple[str, bool]:
    """Host in numbers as in an endpoint, and whether that is IPv6. Of a name with both the IPv4 address is taken.

    ZMQ itself resolves names to one family alone, and takes an unknown name for a server that is not running.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServingError(
            f"host={address.host!r} cannot be resolved: {error}; check the spelling, or give the address"
        ) from error
    family, *_, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    host = str(where[0])
    if len(where) == 4 and where[3] and "%" not in host:
        host += f"%{where[3]}"
    if family == socket.AF_INET6:
        try:
            socket.socket(family, socket.SOCK_STREAM).close()
        except OSError as error:
            raise ServingError(
                f"host={address.host!r}: this machine has no IPv6 ({error}); give an IPv4 address"
            ) from error
    return _bracketed(host), family == socket.AF_INET6


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _as_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
