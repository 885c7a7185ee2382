"""Which repositories an adapter is made from: each with the commit that it was resolved to.

A branch moves and a commit does not, so that only the latter says what was used. A local path is never recorded: it
means nothing elsewhere, and tells about the machine.
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
    """`value` if it is an origin, as read from a file of a stranger's; else None."""
    if isinstance(value, Mapping) and value.keys() == {"repo_id", "revision"}:
        repo_id, revision = value["repo_id"], value["revision"]
        texts = isinstance(repo_id, str) and isinstance(revision, str)
        if texts and _REPO.fullmatch(repo_id) and _COMMIT.fullmatch(revision):
            return {"repo_id": repo_id, "revision": revision}
    return None


def snapshot_origin(path: str | Path, *, root: bool = False) -> Origin | None:
    """The repository and commit of a path in the client's cache; None for another path.

    Args:
        path: a snapshot's folder, or something in it.
        root: only the folder itself counts.
    """
    match = _SNAPSHOT.search(str(path))
    if match is None or (root and match.end() < len(str(path).rstrip("/\\"))):
        return None
    return {"repo_id": f"{match[1]}/{match[2]}", "revision": match[3]}


def origins_of(policy: nn.Module, lam: nn.Module) -> dict[str, Origin]:
    """What is known: "policy", "lam" and "image_encoder", each {"repo_id", "revision"} with the commit.

    The policy's is what its configuration tells (`_name_or_path`, `pretrained_path`, `_commit_hash`); where it tells no
    commit, and the cache has several, it is left out: a guess would be worse than nothing.
    """
    config = getattr(lam, "config", None)
    found = {
        "policy": _policy_origin(getattr(policy, "config", None)),
        "lam": checked(getattr(lam, "origin", None)),
        "image_encoder": checked(
            {
                "repo_id": getattr(config, "image_encoder", None),
                "revision": getattr(config, "image_encoder_revision", None),
            }
        ),
    }
    return {name: origin for name, origin in found.items() if origin is not None}


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
    """The one commit of a repository that is in the client's cache, which is what was loaded; None if there are several.

    Newer versions of transformers, and LeRobot, do not keep the commit in the configuration.
    """
    if not _REPO.fullmatch(repo_id):
        return None
    from huggingface_hub import constants

    snapshots = list(Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots").glob("*"))
    return snapshot_origin(snapshots[0]) if len(snapshots) == 1 else None


def warn_of_others(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say if an adapter is attached to another policy, or another version of it, than it was saved from."""
    was, is_ = checked(saved.get("policy")), checked(now.get("policy"))
    if was and is_ and was != is_:
        logger.warning(
            "this adapter was saved from %s at %s, and is attached to %s at %s; load the policy with revision=%r to go on "
            "from exactly that",
            was["repo_id"], was["revision"], is_["repo_id"], is_["revision"], was["revision"],
        )  # fmt: skip
