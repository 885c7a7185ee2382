"""One connection of the local Hub: who asks, the planned fault, the answer; the endpoints are in endpoints.py."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.faults import Fault, Seen
from hub.repos import Refused


class Broken(Exception):
    """The connection is to be broken, as planned."""


class Connection(BaseHTTPRequestHandler):
    hub: Any
    protocol_version = "HTTP/1.1"
    user: str | None
    fault: Fault | None
    record: Seen

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, Broken):
            self.close_connection = True

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(split.query).items()}
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.user = self.hub.store.tokens.get(token or "")
        self.record = Seen(self.command, unquote(split.path), self.user, token, dict(self.headers))
        self.hub.seen.append(self.record)
        self.fault = self._planned()
        try:
            if self.fault and self.command == "PUT" and self.fault.status is None and not self.fault.alter:
                self.record.received = len(self.rfile.read(self.fault.after))
                self._break()
            length = int(self.headers.get("Content-Length") or 0)
            body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            self.record.received = len(body)
            if self.fault and self.fault.status is not None:
                return self._answer(self.fault.status, {"error": "planned fault"}, self.fault.headers)
            if self.fault and not (self.fault.alter or self.fault.lose) and self.command != "GET":
                self._break()
            if token is not None and self.user is None:
                raise Refused(401, "Invalid credentials in Authorization header")
            self.route(split.path, body)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            body_ = {"error": refused.message, **refused.body}
            if refused.status == 409 and "id" in refused.body:
                body_["url"] = f"{self.hub.url}/{refused.body['id']}"
            self._answer(refused.status, body_, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _planned(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.method == self.command and re.search(fault.path, self.record.path) and fault.times:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                if fault.call is None:
                    return fault
                fault.call()
        return None

    def _break(self) -> None:
        if self.fault and self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        raise Broken

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.record.status = status
        if self.fault and self.fault.lose:
            self._break()
        headers = dict(headers or {})
        if not isinstance(body, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.status is None and self.command == "GET":
            if not self.fault.alter:
                self.wfile.write(data[: self.fault.after])
                self.wfile.flush()
                if self.fault.reset:
                    time.sleep(0.05)  # or the reset overtakes what was written
                self._break()
            data = bytes([data[0] ^ 1]) + data[1:]
        self.wfile.write(data)

    def route(self, path: str, body: bytes) -> None:
        raise NotImplementedError
