"""The repositories that an adapter is made from, each with its commit.

Commits and not branches, which move. A local path is never recorded: it means nothing elsewhere, and describes the machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["Origin", "checked", "origins_of", "snapshot_origin", "warn_of_others"]

logger = logging.getLogger(__name__)

Origin = dict[str, str]  # {"repo_id": "user/name", "revision": commit}

# how the Hub's client lays out its cache
_SNAPSHOT = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def checked(value: Any) -> Origin | None:
    """`value`, read from an untrusted file, if it is an origin; else None."""
    if isinstance(value, Mapping) and value.keys() == {"repo_id", "revision"}:
        repo_id, revision = value["repo_id"], value["revision"]
        texts = isinstance(repo_id, str) and isinstance(revision, str)
        if texts and _REPO.fullmatch(repo_id) and _COMMIT.fullmatch(revision):
            return {"repo_id": repo_id, "revision": revision}
    return None


def snapshot_origin(path: str | Path, *, root: bool = False) -> Origin | None:
    """The origin of a snapshot's folder in the client's cache, or of a path in it unless `root`; None for other paths."""
    match = _SNAPSHOT.search(str(path))
    if match is None or (root and match.end() < len(str(path).rstrip("/\\"))):
        return None
    return {"repo_id": f"{match[1]}/{match[2]}", "revision": match[3]}


def origins_of(policy: nn.Module, lam: nn.Module) -> dict[str, Origin]:
    """The known origins of "policy", "lam" and "image_encoder", each {"repo_id", "revision"} with the commit.

    The policy's is in its configuration (`_name_or_path`, `pretrained_path`, `_commit_hash`). Without a commit there, and
    with several in the cache, it is left out rather than guessed.
    """
    config = getattr(lam, "config", None)
    encoder, commit = getattr(config, "image_encoder", None), getattr(config, "image_encoder_revision", None)
    origins = {
        "policy": _policy_origin(getattr(policy, "config", None)),
        "lam": checked(getattr(lam, "origin", None)),
        "image_encoder": checked({"repo_id": encoder, "revision": commit}),
    }
    return {name: origin for name, origin in origins.items() if origin is not None}


def _policy_origin(config: Any) -> Origin | None:
    for field in ("_name_or_path", "pretrained_path"):
        name = getattr(config, field, None)
        if not isinstance(name, str | Path) or not str(name):
            continue
        origin = snapshot_origin(name)
        if origin is None and not Path(name).exists():
            commit = getattr(config, "_commit_hash", None)
            origin = checked({"repo_id": str(name), "revision": commit}) or _in_cache(str(name))
        if origin is not None:
            return origin
    return None


def _in_cache(repo_id: str) -> Origin | None:
    """The only commit of a repository in the client's cache, which must be the loaded one; None if there are several.

    Newer versions of transformers, and LeRobot, do not keep the commit in the configuration.
    """
    if not _REPO.fullmatch(repo_id):
        return None
    from huggingface_hub import constants

    snapshots = list(Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots").glob("*"))
    return snapshot_origin(snapshots[0]) if len(snapshots) == 1 else None


def warn_of_others(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if an adapter is attached to another policy, or another version of it, than it was saved from."""
    old, new = checked(saved.get("policy")), checked(now.get("policy"))
    if old and new and old != new:
        logger.warning(
            "this adapter was saved from %s at %s, but is attached to %s at %s; load the policy with revision=%r to use "
            "exactly that",
            old["repo_id"], old["revision"], new["repo_id"], new["revision"], old["revision"],
        )  # fmt: skip
