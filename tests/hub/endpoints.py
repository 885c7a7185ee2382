"""What the local Hub answers: one method per endpoint that the clients call."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote

from hub.connection import Connection
from hub.repos import Refused


class Endpoints(Connection):
    """See the table at the end for what is asked where."""

    def route(self, path: str, body: bytes) -> None:
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return handler(self, *map(unquote, match.groups()), body=body)
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    def whoami(self, body: bytes) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        self._answer(200, {"type": "user", "name": self.user, "orgs": []})

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no metadata"}]
        self._answer(200, {"errors": [], "warnings": errors})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        private = asked.get("private")
        if "visibility" in asked:
            private = asked["visibility"] == "private"
        repo = self.hub.store.create(self.user, asked.get("organization") or str(self.user), asked["name"], private)
        self._answer(200, {"url": f"{self.hub.url}/{repo.id}", "name": repo.id, "id": repo.id})

    def info(self, repo_id: str, revision: str = "main", *, body: bytes) -> None:
        repo = self.hub.store.read(self.user, repo_id)
        sha = repo.resolve(revision)
        files = [{"rfilename": path} for path in repo.commits[sha].tree]
        told = {"id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "gated": repo.gated}
        self._answer(200, {**told, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str, *, body: bytes) -> None:
        repo = self.hub.store.read(self.user, repo_id)
        listed = []
        for path, entry in repo.commits[repo.resolve(revision)].tree.items():
            told: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": len(entry.data)}
            if entry.large:
                told["lfs"] = {"oid": entry.oid, "size": len(entry.data), "pointerSize": 130}
            listed.append(told)
        self._answer(200, listed)

    def refs(self, repo_id: str, *, body: bytes) -> None:
        repo = self.hub.store.read(self.user, repo_id)
        named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        self._answer(200, {"branches": named, "converts": [], "tags": []})

    def discussions(self, repo_id: str, *, body: bytes) -> None:
        """Each branch refs/pr/N is a pull request; its first commit's message is the title, "author: title"."""
        repo = self.hub.store.read(self.user, repo_id)
        listed = []
        for name, sha in repo.branches.items():
            if name.startswith("refs/pr/"):
                author, _, title = repo.commits[sha].message.partition(": ")
                told = {"title": title, "author": {"name": author}, "status": "open", "isPullRequest": True}
                told |= {"num": int(name.rpartition("/")[2]), "createdAt": "2024-01-01T00:00:00.000Z"}
                listed.append({**told, "repo": {"name": repo_id, "type": "model"}})
        self._answer(200, {"discussions": listed, "count": len(listed), "start": 0})

    def branch(self, repo_id: str, branch: str, *, body: bytes) -> None:
        repo = self.hub.store.write(self.user, repo_id)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(body or b"{}").get("startingPoint") or "main")
        self._answer(200, {})

    def preupload(self, repo_id: str, revision: str, *, body: bytes) -> None:
        repo = self.hub.store.write(self.user, repo_id)
        tree = repo.commits[repo.resolve(revision)].tree
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(".safetensors") or entry["size"] > 10**7 else "regular",
                "shouldIgnore": False,
                **({"oid": tree[entry["path"]].oid} if entry["path"] in tree else {}),
            }
            for entry in json.loads(body)["files"]
        ]
        self._answer(200, {"files": modes, "commitOid": repo.resolve(revision)})

    def batch(self, repo_id: str, *, body: bytes) -> None:
        self.hub.store.write(self.user, repo_id)
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            told: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
            if oid not in self.hub.store.large:
                upload: dict[str, Any] = {"href": f"{self.hub.cdn}/upload/{oid}"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {f"{n:05d}": f"{self.hub.cdn}/upload/{oid}?part={n}" for n in range(1, count + 1)}
                    upload = {"href": f"{self.hub.url}/complete/{oid}"}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **parts}
                verify = {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                told["actions"] = {"upload": upload, "verify": verify}
            objects.append(told)
        large = any("header" in o.get("actions", {}).get("upload", {}) for o in objects)
        self._answer(200, {"transfer": "multipart" if large else "basic", "objects": objects})

    def upload(self, oid: str, *, body: bytes) -> None:
        if self.record.token is not None:
            raise Refused(400, "Only one auth mechanism allowed")  # as S3 says to a signed URL with a token
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"])] = body
        else:
            self._keep(oid, body)
        self._answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, oid: str, *, body: bytes) -> None:
        parts = json.loads(body)["parts"]
        self._keep(oid, b"".join(self.hub.parts[oid, part["partNumber"]] for part in parts))
        self._answer(200, {})

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "The provided 'x-amz-content-sha256' header does not match what was computed.")
        self.hub.store.large[oid] = data

    def verify(self, repo_id: str, *, body: bytes) -> None:
        self.hub.store.write(self.user, repo_id)
        asked = json.loads(body)
        if len(self.hub.store.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "Object not found")
        self._answer(200, {})

    def commit(self, repo_id: str, revision: str, *, body: bytes) -> None:
        repo = self.hub.store.write(self.user, repo_id)
        sha = self.hub.store.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
        url = f"{self.hub.url}/{repo.id}/commit/{sha}"
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def resolve(self, repo_id: str, revision: str, path: str, *, body: bytes) -> None:
        repo = self.hub.store.read(self.user, repo_id)
        if repo.gated and self.user not in self.hub.store.writers[repo_id.split("/")[0]]:
            status = 401 if self.user is None else 403
            raise Refused(status, f"Access to model {repo_id} is restricted. You must have access to it.", "GatedRepo")
        sha = repo.resolve(revision)
        entry = repo.commits[sha].tree.get(path)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.large:
            linked = {"X-Linked-Etag": f'"{entry.oid}"', "X-Linked-Size": str(len(entry.data))}
            return self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{entry.oid}"})
        self._ranged(entry.data, headers)

    def cdn(self, oid: str, *, body: bytes) -> None:
        if self.record.token is not None:
            raise Refused(400, "Only one auth mechanism allowed")
        self._ranged(self.hub.store.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._answer(200, data, headers)
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self._answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


_ID = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("GET",), "/api/whoami-v2", Endpoints.whoami),
    (("POST",), "/api/validate-yaml", Endpoints.validate),
    (("POST",), "/api/repos/create", Endpoints.create),
    (("GET",), f"/api/models/{_ID}", Endpoints.info),
    (("GET",), f"/api/models/{_ID}/revision/([^/]+)", Endpoints.info),
    (("GET",), f"/api/models/{_ID}/tree/([^/]+)", Endpoints.tree),
    (("GET",), f"/api/models/{_ID}/refs", Endpoints.refs),
    (("GET",), f"/api/models/{_ID}/discussions", Endpoints.discussions),
    (("POST",), f"/api/models/{_ID}/branch/([^/]+)", Endpoints.branch),
    (("POST",), f"/api/models/{_ID}/preupload/([^/]+)", Endpoints.preupload),
    (("POST",), f"/api/models/{_ID}/commit/([^/]+)", Endpoints.commit),
    (("POST",), f"/{_ID}\\.git/info/lfs/objects/batch", Endpoints.batch),
    (("POST",), f"/{_ID}\\.git/info/lfs/objects/verify", Endpoints.verify),
    (("PUT",), "/upload/([0-9a-f]{64})", Endpoints.upload),
    (("POST",), "/complete/([0-9a-f]{64})", Endpoints.complete),
    (("GET", "HEAD"), "/cdn/([0-9a-f]{64})", Endpoints.cdn),
    (("GET", "HEAD"), f"/{_ID}/resolve/([^/]+)/(.+)", Endpoints.resolve),
]
