"""What a Hub keeps: repositories with immutable commits and branches, large files by checksum, users and their tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """An answer other than success.

    Args:
        status: of HTTP.
        message: X-Error-Message, as the Hub words it.
        code: X-Error-Code; the client's error classes follow from it.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Entry:
    """One file of a commit: in git itself, or a pointer to a large file."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The checksum that the Hub gives as ETag: sha256 of a large file, else git's blob id."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot."""

    tree: dict[str, Entry]
    message: str
    parent: str | None

    @property
    def sha(self) -> str:
        content = [sorted((path, entry.oid) for path, entry in self.tree.items()), self.message, self.parent]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass
class Repo:
    """A model repository."""

    id: str
    private: bool
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit.sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: entry.data for path, entry in self.commits[self.resolve(revision)].tree.items()}

    def history(self, revision: str = "main") -> list[Commit]:
        sha: str | None = self.resolve(revision)
        found = []
        while sha is not None:
            found.append(self.commits[sha])
            sha = self.commits[sha].parent
        return found


class Store:
    """All repositories of a Hub."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content, whether a commit refers to it or not
        # token -> user; "lab" is an organization of alice's whose repositories are private by default
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.writers = {"alice": {"alice"}, "bob": {"bob"}, "lab": {"alice"}}
        self.readers = {"alice": {"alice"}, "bob": {"bob"}, "lab": {"alice"}}
        self.private_by_default = {"lab"}
        self.lock = threading.RLock()

    def create(self, user: str | None, owner: str, name: str, private: bool | None) -> Repo:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user not in self.writers.get(owner, ()):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        full = f"{owner}/{name}"
        if full in self.repos:
            raise Refused(409, "You already created this model repo", id=full, name=full)
        private = owner in self.private_by_default if private is None else private
        repo = self.repos[full] = Repo(full, private)
        attributes = Entry(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)
        repo.add("main", Commit({".gitattributes": attributes}, "initial commit", None))
        return repo

    def read(self, user: str | None, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user not in self.readers[repo_id.split("/")[0]]):
            # who is not logged in is not told whether it exists
            if user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def write(self, user: str | None, repo_id: str) -> Repo:
        repo = self.read(user, repo_id)
        if user not in self.writers[repo_id.split("/")[0]]:
            raise Refused(403, "Authorization error: you do not have write access to this repo")
        return repo

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> str:
        """Apply the client's ndjson: everything, or nothing."""
        with self.lock:
            head = repo.resolve(branch)
            if branch not in repo.branches:
                raise Refused(400, "A commit can only be made to a branch")
            tree = dict(repo.commits[head].tree)
            message = ""
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                    if value.get("parentCommit") not in (None, head):
                        raise Refused(412, "A commit has happened since. Please refresh and try again.")
                elif line["key"] == "file":
                    tree[value["path"]] = Entry(base64.b64decode(value["content"]), False)
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.large:
                        raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                    tree[value["path"]] = Entry(self.large[value["oid"]], True)
                elif line["key"] == "deletedFile":
                    if value["path"] not in tree:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    del tree[value["path"]]
                else:
                    raise Refused(400, f"unknown operation {line['key']}")
            return repo.add(branch, Commit(tree, message, head))
