"""Errors of the Hub's client as one :class:`HubError` with the fix.

The client uses requests in 0.x and httpx in 1.x and 2.x, and wraps their errors in its own: the whole chain of causes
counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import HubError, LaraError

__all__ = ["chain_of", "explained", "is_broken", "status_of"]

_TRANSPORT = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None, doing: str) -> Iterator[None]:
    """A context that turns the client's errors into one :class:`HubError` with the fix."""
    try:
        yield
    except LaraError:
        raise
    except Exception as error:
        chain = chain_of(error)
        if isinstance(error, (OSError, ValueError, RuntimeError)) or any(_is_transport(e) for e in chain):
            raise HubError(_explain(chain, repo_id, revision, doing)) from error
        raise


def chain_of(error: BaseException | None) -> list[BaseException]:
    """An error and what caused it, the outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def _is_transport(error: BaseException) -> bool:
    return any(kind.__module__.partition(".")[0] in _TRANSPORT for kind in type(error).__mro__)


def is_broken(error: BaseException) -> bool:
    """Whether a transfer was interrupted, rather than a connection not made."""
    return type(error).__name__ in {
        "ChunkedEncodingError", "ReadError", "RemoteProtocolError", "IncompleteRead", "ConnectionResetError", "ReadTimeout",
    }  # fmt: skip


def status_of(chain: list[BaseException]) -> int | None:
    """The HTTP status of the response behind an error, if there is one."""
    return next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)


def _explain(chain: list[BaseException], repo_id: str, revision: str | None, doing: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    status = status_of(chain)
    name = f"{repo_id!r}" if revision is None else f"{repo_id!r} (revision {revision!r})"
    reply = " ".join(str(chain[-1] if status is None else chain[0]).split())[:300]
    login = "log in (hf auth login) or set HF_TOKEN"
    again = (
        # all of it if only the reply to the commit was lost, else nothing
        "the upload is there completely or not at all; push again, files are not sent twice"
        if doing == "push"
        else "load it again; files that were downloaded are kept"
    )
    if has(hub.OfflineModeIsEnabled) and doing == "push":
        return f"cannot push {name}: HF_HUB_OFFLINE is set; push with a connection"
    if has(hub.OfflineModeIsEnabled):
        return (
            f"{name} is not complete in the cache {constants.HF_HUB_CACHE}, and the Hub is not asked (HF_HUB_OFFLINE is "
            "set); load it once with a connection, or name a commit that is in the cache"
        )
    if has(hub.GatedRepoError):
        return f"{name} is gated: ask for access on its page on the Hub, then {login}. The Hub replied: {reply}"
    if has(hub.RevisionNotFoundError):
        return f"{repo_id!r} has no branch, tag or commit {revision!r}; see its commits on the Hub"
    if has(hub.RepositoryNotFoundError) or (status == 401 and doing == "load" and "credentials" not in str(chain[0])):
        return (
            f"the Hub has no model repository {repo_id!r}, or it is private and not readable (the Hub does not tell "
            f"which). Check the name; for a private one {login}, with a token that may read it"
        )
    if status == 401:
        return f"the Hub does not accept the access token, or needs one ({doing} {name}): {login}. It replied: {reply}"
    if status == 403:
        may = "read it" if doing == "load" else "write to it"
        return f"no permission to {doing} {name}: {login}, with a token that may {may}. The Hub replied: {reply}"
    if status in (409, 412):
        return f"{name} was changed by somebody else in the meantime, and nothing was overwritten; {doing} again"
    if status == 429:
        return f"the Hub limits the rate of requests (429), also after retries: wait some minutes, then {again}"
    if status is not None and status >= 500:
        return f"the Hub fails ({status}), also after retries ({doing} {name}): later, {again}"
    if status is not None:
        return f"the Hub refused to {doing} {name} ({status}): {reply}"
    if any(_is_transport(e) or isinstance(e, ConnectionError | TimeoutError) for e in chain):
        return (
            f"cannot connect to the Hub at {constants.ENDPOINT}, or the connection broke ({doing} {name}): {again}. "
            f"{type(chain[-1]).__name__}: {reply}"
        )
    return f"cannot {doing} {name}: {type(chain[0]).__name__}: {reply}; {again}"
