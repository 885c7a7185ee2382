"""The Hugging Face Hub: the one module of the core that talks to it.

Whatever its client raises (0.x over requests, 1.x and 2.x over httpx) leaves here as one clear :class:`LaraError`. A
download is checked against the checksum that the Hub gave; an upload is one commit, or nothing that anybody sees.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError, HubError, LaraArgumentError
from .files import ADAPTER_FILE, neighbours, sha256
from .hub_errors import chain_of, explained, is_broken, status_of

__all__ = ["CARD_FILE", "COMMIT", "check_target", "download", "find_conversion", "is_repo_id",
           "locate_folder", "push_folder"]  # fmt: skip

COMMIT = re.compile(r"[0-9a-f]{40}")
CARD_FILE = "README.md"  # where the Hub looks for a repository's model card
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")  # a large file lies in the client's cache under its sha256
_TRIES = 3


def is_repo_id(text: str) -> bool:
    """Whether `text` can be the id of a repository, "user/name"."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def download(repo_id: str, revision: str | None, patterns: Sequence[str], what: str, repo_type: str = "model") -> Path:
    """Download files of a repository into the client's cache.

    Cached files are not downloaded again; with a commit as `revision` the Hub need not be reachable.

    Args:
        repo_id: "user/name".
        revision: commit, tag or branch; None: its main branch.
        patterns: the files to download; the first one must match a file.
        what: what the repository should hold, for messages: "LARA adapter".
        repo_type: "model", or "dataset", which has too many files to check all sums at each load.

    Returns:
        The snapshot's folder.

    Raises:
        HubError: it cannot be reached, found or read, or a file does not have the Hub's checksum.
        AdapterFormatError: `repo_id` is not an id, or the repository holds something else.
    """
    from huggingface_hub import snapshot_download

    if not is_repo_id(repo_id):
        raise AdapterFormatError(
            f"{repo_id!r} is neither an existing folder nor a Hub id 'user/name' (a {what} is expected): check the path"
        )
    with explained(repo_id, revision, "load"):
        for left in reversed(range(_TRIES)):
            try:
                files: dict[str, Any] = {"allow_patterns": list(patterns), "repo_type": repo_type}
                folder = Path(snapshot_download(repo_id, revision=revision, **files))
                break
            # clients differ in which interrupted transfers they resume themselves; the next call continues
            except Exception as error:
                chain = chain_of(error)
                if not left or status_of(chain) is not None or not any(is_broken(e) for e in chain):
                    raise
    if not any(path.is_file() for path in folder.glob(patterns[0])):
        raise AdapterFormatError(
            f"{repo_id!r} at {folder.name} has no {what}: {patterns[0]} is missing. "
            f"{_contents(repo_id, folder.name, repo_type)}"
        )
    if repo_type == "model":
        _check(folder, repo_id, patterns)
    return folder


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path in a repository matches, as the client sees it."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check(folder: Path, repo_id: str, patterns: Sequence[str]) -> None:
    """Compare large files with the Hub's checksum: the client compares only sizes.

    Other files are not read: the same snapshot may hold a policy of many gigabytes.
    """
    for path in sorted(folder.rglob("*")):
        if not _matches(path.relative_to(folder).as_posix(), patterns):
            continue
        blob = path.resolve()
        if path.is_symlink() and _LFS_BLOB.fullmatch(blob.name) and blob.is_file() and sha256(blob) != blob.name:
            fix = "The damaged copy was removed from the cache; load it again"
            try:
                blob.unlink()
                path.unlink()
            except OSError as error:
                fix = f"Remove {blob}, which was not permitted ({type(error).__name__}), and load it again"
            raise HubError(f"{repo_id!r}: {path.relative_to(folder)} is damaged: its sha256 is not the Hub's. {fix}")


def _contents(repo_id: str, commit: str, repo_type: str) -> str:
    """One sentence on what a repository holds instead of what was expected; none of it is interpreted."""
    from huggingface_hub import HfApi, hf_hub_download

    config: Any = {}
    try:
        files = HfApi().list_repo_files(repo_id, revision=commit, repo_type=repo_type)
        if "config.json" in files:
            path = Path(hf_hub_download(repo_id, "config.json", revision=commit, repo_type=repo_type))
            config = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < 2**24 else {}
    except Exception as error:
        return f"(Its content cannot be listed: {type(error).__name__}.)"
    config = config if isinstance(config, dict) else {}
    kind = config.get("model_type") or config.get("type")
    if ADAPTER_FILE in files:
        return "It holds a LARA adapter: use load_lara(policy, ...)"
    if str(config.get("format", "")).startswith("lara_adapter."):
        return "It holds a latent action model: use LatentActionModel.from_pretrained(...)"
    if "adapter_config.json" in files:
        return "It holds a peft adapter, without LARA's part"
    if isinstance(kind, str):
        return (
            f"It holds a model of type {kind[:80]!r}, perhaps the policy itself; the adapter is a separate repository"
        )
    return f"It holds {sorted(files)[:12]}"


def find_conversion(repo_id: str) -> str | None:
    """The commit in which the Hub's converter proposed safetensors for a repository of pickles, if it did."""
    from huggingface_hub import HfApi

    api = HfApi()
    with explained(repo_id, None, "load"):
        for entry in api.get_repo_discussions(repo_id):
            key = (entry.is_pull_request, entry.author, entry.status, entry.title)
            if key == (True, "SFconvertbot", "open", "Adding `safetensors` variant of this model"):
                return api.model_info(repo_id, revision=f"refs/pr/{entry.num}").sha
    return None


def check_target(repo_id: str, revision: str | None) -> None:
    """Check the target of a push before anything is saved.

    Raises:
        LaraArgumentError: `repo_id` is not an id, or `revision` is a commit.
    """
    if not is_repo_id(repo_id):
        raise LaraArgumentError(
            f"push_to_hub: repo_id={repo_id!r}, but 'user/name' is expected (letters, digits, . _ -)"
        )
    if revision is not None and COMMIT.fullmatch(revision):
        raise LaraArgumentError(f"push_to_hub: revision={revision!r} is a commit, which cannot change; name a branch")


def push_folder(
    folder: Path, repo_id: str, ours: Sequence[str], *, private: bool | None, revision: str | None, message: str,
    token: str | None, card: Callable[[str | None], str],
) -> str:  # fmt: skip
    """Upload a folder to a repository in one commit; other files in it stay.

    Files that were uploaded before a failure are not sent again by the next call, and not visible before the commit.

    Args:
        folder: holds the files.
        repo_id: "user/name"; created if it does not exist.
        ours: patterns of our files: those that `folder` does not have are deleted.
        private: visibility of a new repository; None: the default of its owner.
        revision: branch; created from main if it does not exist. None: the main branch.
        message: of the commit.
        token: access token; None: the one that the client finds.
        card: from the text of the repository's README.md (None without one) to the new one.

    Returns:
        URL of the commit; it ends in the commit's hash.

    Raises:
        LaraArgumentError: `repo_id` is not an id, or `revision` is a commit.
        HubError: it cannot be reached, or does not accept the upload.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    check_target(repo_id, revision)
    api = HfApi(token=token)
    with explained(repo_id, revision, "push"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision or "main")
        existing = [entry.rfilename for entry in info.siblings or ()]
        old = None
        if CARD_FILE in existing:
            old = Path(hf_hub_download(repo_id, CARD_FILE, revision=info.sha, token=token)).read_text(encoding="utf-8")
        (folder / CARD_FILE).write_text(card(old), encoding="utf-8")
        new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        gone = [name for name in existing if name not in new and _matches(name, ours)]
        # not upload_folder, which in 1.x and 2.x may make several commits. parent_commit: does not undo what others have
        # changed meanwhile
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationDelete(name) for name in gone), *(CommitOperationAdd(k, v) for k, v in new.items())],
            commit_message=message,
            revision=revision,
            parent_commit=info.sha,
        )
    return str(commit.commit_url)


def locate_folder(
    source: str | os.PathLike[str], revision: str | None, patterns: list[str], what: str = "LARA adapter",
    repo_type: str = "model",
) -> Path:  # fmt: skip
    """A local folder, or the snapshot of the Hub repository `source`; the rest is passed to :func:`download`.

    Raises:
        AdapterFormatError: neither a folder nor a Hub id, or the repository holds something else.
        HubError: the repository cannot be reached, found or read.
    """
    folder, text = Path(source), str(source)
    if folder.is_dir():
        if "*" not in patterns[0] and not os.path.lexists(folder / patterns[0]):
            raise AdapterFormatError(f"{folder} is not a {what}: {patterns[0]} is missing; {neighbours(folder)}")
        return folder
    if folder.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise AdapterFormatError(f"{neighbours(folder)}; the folder of a {what} is expected, or a Hub id 'user/name'")
    return download(text, revision, patterns, what, repo_type)
