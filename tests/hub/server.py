"""A small Hugging Face Hub on a local port, which the real clients (0.3x, 1.x, 2.x) push to and load from.

It answers what those clients ask when a model repository is created, uploaded to (LFS, in one piece or in parts; no
Xet), read and branched, with the Hub's statuses, headers and error codes. Large files are served by a second host name,
as the Hub's are by its CDN. A test can plan faults and look at every request.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from hub.endpoints import Endpoints
from hub.faults import Fault, Seen
from hub.repos import Repo, Store


class HubServer:
    """The server; use it as a context.

    Args:
        part_size: large files of more bytes are uploaded in parts of so many.
    """

    def __init__(self, part_size: int = 2**40) -> None:
        self.store = Store()
        self.part_size = part_size
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Endpoints,), {"hub": self}))
        self._http.daemon_threads = True
        port = self._http.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Plan a fault; see :class:`Fault`."""
        self.faults.append(Fault(method, path, **how))
        return self.faults[-1]

    def requests(self, method: str, path: str) -> list[Seen]:
        """The requests so far that match."""
        return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]

    def forget(self) -> None:
        """Drop planned faults and the record of requests."""
        self.faults.clear()
        self.seen.clear()

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main", message: str = "files") -> Repo:
        """A commit with these files to a repository, which is made if needed; without HTTP."""
        owner, name = repo_id.split("/")
        self.store.writers.setdefault(owner, {owner})
        self.store.readers.setdefault(owner, {owner})
        repo = self.store.repos.get(repo_id) or self.store.create(
            next(iter(self.store.writers[owner])), owner, name, None
        )
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": message}}]
        for path, data in files.items():
            if path.endswith(".safetensors"):
                oid = hashlib.sha256(data).hexdigest()
                self.store.large[oid] = data
                lines.append({"key": "lfsFile", "value": {"path": path, "oid": oid}})
            else:
                lines.append({"key": "file", "value": {"path": path, "content": base64.b64encode(data)}})
        repo.branches.setdefault(branch, repo.branches["main"])
        self.store.commit(repo, branch, lines)
        return repo
