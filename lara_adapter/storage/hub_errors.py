"""What the Hub's client raises, as one clear error that says the mend.

The client raises over requests in 0.x and over httpx in 1.x and 2.x, and wraps what it catches in errors of its own, so
that the whole chain of causes is looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import HubError, LaraError

__all__ = ["chain_of", "explained", "is_broken", "status_of"]

_TRANSPORT = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turn what the client raises into one :class:`HubError` that says the mend."""
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
    """A transfer that began and broke, and not a connection that could not be made."""
    return type(error).__name__ in {
        "ChunkedEncodingError", "ReadError", "RemoteProtocolError", "IncompleteRead", "ConnectionResetError", "ReadTimeout",
    }  # fmt: skip


def status_of(chain: list[BaseException]) -> int | None:
    """The HTTP status that an answer was refused with."""
    return next((s for e in chain if (s := getattr(getattr(e, "response", None), "status_code", None))), None)


def _explain(chain: list[BaseException], repo_id: str, revision: str | None, doing: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    status = status_of(chain)
    name = f"{repo_id!r}" if revision is None else f"{repo_id!r} (revision {revision!r})"
    said = " ".join(str(chain[-1] if status is None else chain[0]).split())[:300]
    login = "log in (hf auth login) or set HF_TOKEN"
    again = (
        # nothing, or all if the answer to the commit itself was lost
        "it is there whole or not at all; push again, files that were uploaded are not sent twice"
        if doing == "push"
        else "load it again; files that were downloaded are kept"
    )
    if met(hub.OfflineModeIsEnabled) and doing == "push":
        return f"cannot push {name}: the Hub may not be asked (HF_HUB_OFFLINE is set); push with a connection"
    if met(hub.OfflineModeIsEnabled):
        return (
            f"{name} is needed from the Hub, which may not be asked (HF_HUB_OFFLINE is set), and is not complete in the "
            f"cache {constants.HF_HUB_CACHE}; load it once with a connection, or name a commit that is in the cache"
        )
    if met(hub.GatedRepoError):
        return f"{name} is gated: ask for access on its page on the Hub, then {login}. The Hub said: {said}"
    if met(hub.RevisionNotFoundError):
        return f"{repo_id!r} has no branch, tag or commit {revision!r}; look at its commits on the Hub"
    if met(hub.RepositoryNotFoundError):
        return _no_repository(repo_id, login)
    if status == 401 and doing == "load" and "credentials" not in str(chain[0]):
        return _no_repository(repo_id, login)
    if status == 401:
        return f"the Hub does not accept the access token, or wants one ({doing} {name}): {login}. It said: {said}"
    if status == 403:
        return f"no permission to {doing} {name}: {login}, with a token that may {_MAY[doing]}. The Hub said: {said}"
    if status in (409, 412):
        return f"{name} was changed by somebody else meanwhile, and nothing was overwritten; {doing} again"
    if status == 429:
        return f"the Hub limits the rate of requests (429) and went on doing so: wait some minutes, then {again}"
    if status is not None and status >= 500:
        return f"the Hub fails at the moment ({status}), also after retries ({doing} {name}): later, {again}"
    if status is not None:
        return f"the Hub refused to {doing} {name} ({status}): {said}"
    if any(_is_transport(e) or isinstance(e, ConnectionError | TimeoutError) for e in chain):
        return (
            f"the connection to the Hub at {constants.ENDPOINT} cannot be made or broke off ({doing} {name}): {again}. "
            f"{type(chain[-1]).__name__}: {said}"
        )
    return f"cannot {doing} {name}: {type(chain[0]).__name__}: {said}; {again}"


def _no_repository(repo_id: str, login: str) -> str:
    return (
        f"the Hub has no model repository {repo_id!r}, or it is private and may not be read from here (both get the "
        f"same answer). Check the name; for a private one {login}, with a token that may read it"
    )


_MAY = {"load": "read it", "push": "write to it"}
