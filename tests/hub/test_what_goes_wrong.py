"""What a Hub, a network or a user can do wrong: it is survived, or said clearly, and nothing half-done is left."""

from __future__ import annotations

import pytest

BLOBS, CDN = "^/upload/", "^/cdn/"


def history(hub, repo):
    return [commit.message for commit in hub.store.repos[repo].history()]


def fails(client, step, *parts, error="HubError", **arguments):
    failed = client.refused(step, **arguments)
    assert "LaraError" in failed.kinds, failed.trace
    assert failed.kinds[0] == error, failed.trace
    for part in parts:
        assert part in failed.message, failed.message
    assert len(failed.message) < 700
    return failed.message


# ---------------------------------------------------------------------- what is not there, or not for you


def test_no_such_repository(hub, client, acting_as):
    fails(
        client,
        "load",
        "no model repository 'alice/nothing'",
        "it is private",
        "HF_TOKEN",
        name="b",
        repo="alice/nothing",
    )
    acting_as(None)
    fails(
        client,
        "load",
        "no model repository 'alice/nothing'",
        "it is private",
        "HF_TOKEN",
        name="b",
        repo="alice/nothing",
    )
    fails(client, "load_lam", "no model repository 'alice/nothing'", name="b", repo="alice/nothing")


def test_a_private_repository(hub, client, acting_as):
    client("push", name="a", repo="alice/private", private=True)
    for token in (None, "hf_bob"):
        acting_as(token)
        fails(client, "load", "no model repository 'alice/private', or it is private", name="b", repo="alice/private")
    acting_as("hf_alice")
    assert client("load", name="b", repo="alice/private")["step"] == 2


def test_a_token_that_is_none(hub, client, acting_as):
    client("push", name="a", repo="alice/token")
    acting_as("hf_expired")
    fails(client, "load", "does not accept the access token", "hf auth login", name="b", repo="alice/token")
    fails(client, "push", "does not accept the access token", name="a", repo="alice/token")
    acting_as(None)
    fails(client, "push", "or needs one", "hf auth login", name="a", repo="alice/token-2")


def test_a_gated_repository(hub, client, acting_as):
    client("push", name="a", repo="alice/gated")
    hub.store.repos["alice/gated"].gated = True
    for token in (None, "hf_bob"):
        acting_as(token)
        fails(client, "load", "is gated", "ask for access", name="b", repo="alice/gated")


def test_no_such_revision(hub, client):
    client("push", name="a", repo="alice/revision")
    for revision in ("nowhere", "0" * 40):
        fails(
            client, "load", f"no branch, tag or commit '{revision}'", name="b", repo="alice/revision", revision=revision
        )


def test_a_repository_of_something_else(hub, client):
    client("make_lam", name="lam")
    client("push_lam", name="lam", repo="alice/is-lam")
    client("push", name="a", repo="alice/is-adapter")
    hub.put("alice/is-policy", {"config.json": b'{"model_type": "Gr00tN1d6"}', "model.safetensors": b"x"})
    hub.put("alice/is-peft", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.put("alice/is-data", {"data/train.csv": b"1"})
    hub.put("alice/is-odd", {"config.json": b"[" * 10000})
    for repo, what in (
        ("alice/is-lam", "LatentActionModel.from_pretrained"),
        ("alice/is-policy", "a model of type 'Gr00tN1d6'"),
        ("alice/is-peft", "a peft adapter"),
        ("alice/is-data", "data/train.csv"),
        ("alice/is-odd", "cannot be listed"),
    ):
        fails(
            client,
            "load",
            "no LARA adapter",
            "lara_config.json is missing",
            what,
            name="b",
            repo=repo,
            error="AdapterFormatError",
        )
    words = ("no latent action model", "load_lara(policy")
    fails(client, "load_lam", *words, name="b", repo="alice/is-adapter", error="AdapterFormatError")


@pytest.mark.parametrize("repo", ["name", "a b/c", "alice/x--y", "alice/..", "-/x"])
def test_ids_that_are_none(hub, client, repo):
    fails(client, "push", "repo_id=", "'user/name' is expected", name="a", repo=repo, error="LaraArgumentError")
    fails(client, "push_lam", "'user/name' is expected", name="lam", repo=repo, error="LaraArgumentError")
    fails(client, "load", "nor a Hub id", name="b", repo=repo, error="AdapterFormatError")
    assert hub.seen == []


def test_a_commit_cannot_be_pushed_to(hub, client):
    client("push", name="a", repo="alice/a-commit")
    commit = hub.store.repos["alice/a-commit"].branches["main"]
    fails(
        client,
        "push",
        "is a commit",
        "name a branch",
        name="a",
        repo="alice/a-commit",
        revision=commit,
        error="LaraArgumentError",
    )


def test_pushing_where_one_may_not(hub, client, acting_as):
    client("push", name="a", repo="bob/his", token="hf_bob")
    hub.seen.clear()
    fails(client, "push", "no permission to push 'bob/his'", "write to it", name="a", repo="bob/his")
    fails(client, "push", "no permission to push 'bob/new'", name="a", repo="bob/new")
    assert not hub.requests("PUT", BLOBS)
    assert len(history(hub, "bob/his")) == 2


# ---------------------------------------------------------------------- the network


def test_offline_without_a_copy(hub, client, offline):
    client("push", name="a", repo="alice/uncached")
    hub.seen.clear()
    fails(offline, "load", "HF_HUB_OFFLINE is set", "not complete in the cache", name="b", repo="alice/uncached")
    offline("make", name="a")
    fails(offline, "push", "HF_HUB_OFFLINE is set", "push with a connection", name="a", repo="alice/uncached")
    assert hub.seen == []


def test_a_download_that_breaks_is_resumed(hub, client):
    client("push", name="a", repo="alice/resume")
    hub.fail("GET", CDN, after=700)
    assert client("load", name="b", repo="alice/resume")["step"] == 2
    assert client("digest", name="b") == _digest_of_a(client, "alice/resume")
    assert [seen for seen in hub.requests("GET", CDN) if seen.headers.get("Range") == "bytes=700-"]


def _digest_of_a(client, repo):
    """That of an untroubled load."""
    client("load", name="untroubled", repo=repo)
    return client("digest", name="untroubled")


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_breaks_again_and_again(hub, client, reset):
    client("push", name="a", repo=f"alice/breaks-{reset}")
    fault = hub.fail("GET", CDN, after=0, times=99, reset=reset)
    fails(client, "load", "the Hub", "load it again", name="b", repo=f"alice/breaks-{reset}")
    fault.times = 0
    assert client("load", name="b", repo=f"alice/breaks-{reset}")["step"] == 2


def test_a_file_that_arrives_damaged_is_refused_and_fetched_again(hub, client):
    """The client compares the size; that the content is right, only the checksum says."""
    client("push", name="a", repo="alice/damaged")
    fault = hub.fail("GET", CDN, alter=True, times=99)
    for _ in range(2):  # one damaged file is found by each call: of the LAM, of the projector
        fails(client, "load", "is damaged", "sha256", "load it again", name="b", repo="alice/damaged")
    fault.times = 0
    fails(client, "load", "is damaged", name="b", repo="alice/damaged")
    assert client("load", name="b", repo="alice/damaged")["step"] == 2


def test_a_download_that_is_told_to_wait_waits(hub, client):
    client("push", name="a", repo="alice/wait")
    fault = hub.fail("GET", CDN, status=429, headers={"Retry-After": "1"}, times=2)
    client("clear_waits")
    if client("versions")["huggingface_hub"].startswith("0."):  # does not wait on downloads
        fails(client, "load", "limits the rate", "wait some minutes", name="b", repo="alice/wait")
        fault.times = 0
    assert client("load", name="b", repo="alice/wait")["step"] == 2
    assert fault.times == 0


def test_an_upload_that_is_told_to_wait_waits(hub, client):
    client("make", name="fresh", steps=7)
    hub.fail("PUT", BLOBS, status=503, times=2)
    client("clear_waits")
    client("push", name="fresh", repo="alice/wait-2")
    assert len(client("clear_waits")) >= 2
    assert [seen.status for seen in hub.requests("PUT", BLOBS)].count(503) == 2
    assert client("load", name="b", repo="alice/wait-2")["step"] == 7


@pytest.mark.parametrize(
    ("status", "words"), [(429, "limits the rate"), (500, "the Hub fails"), (503, "the Hub fails")]
)
@pytest.mark.parametrize("where", ["GET /api/models/", "HEAD /resolve/"])
def test_a_hub_that_is_down_for_downloads(hub, client, status, words, where):
    repo = f"alice/down-{status}-{where[0]}"
    client("push", name="a", repo=repo)
    method, path = where.split()
    fault = hub.fail(method, path, status=status, times=99)
    fails(client, "load", words, name="b", repo=repo)
    fault.times = 0
    assert client("load", name="b", repo=repo)["step"] == 2
    # what is in the cache is used while the Hub is down
    hub.fail(method, path, status=status, times=99)
    assert client("load", name="b", repo=repo)["step"] == 2


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("/api/repos/create", 429, "limits the rate"),
        ("/preupload/", 500, "the Hub fails"),
        ("/objects/batch", 503, "the Hub fails"),
        ("/commit/", 500, "the Hub fails"),
        ("/commit/", 403, "no permission"),
    ],
)
def test_a_hub_that_is_down_for_uploads(hub, client, where, status, words):
    repo = f"alice/up-{status}-{where.strip('/').replace('/', '-')}"
    fault = hub.fail("POST", where, status=status, times=99)
    fails(client, "push", words, name="a", repo=repo)
    assert repo not in hub.store.repos or history(hub, repo) == ["initial commit"]
    fault.times = 0
    client("push", name="a", repo=repo)
    assert history(hub, repo) == ["Upload LARA adapter", "initial commit"]


def test_an_upload_that_breaks_once_is_retried(hub, client):
    client("make", name="fresh", steps=4)
    hub.fail("PUT", BLOBS, after=1000)
    client("push", name="fresh", repo="alice/once")
    assert history(hub, "alice/once") == ["Upload LARA adapter", "initial commit"]
    assert any(seen.received == 1000 for seen in hub.requests("PUT", BLOBS))
    client("load", name="b", repo="alice/once")


def test_a_broken_upload_leaves_nothing_visible_and_is_resumed(hub, client):
    client("make", name="fresh", steps=5)
    fault = hub.fail("PUT", BLOBS, after=1000, skip=1, times=99)
    fails(client, "push", "completely or not at all", "push again", name="fresh", repo="alice/broken")
    assert history(hub, "alice/broken") == ["initial commit"]
    assert list(hub.store.repos["alice/broken"].files()) == [".gitattributes"]
    fails(client, "load", "no LARA adapter", name="b", repo="alice/broken", error="AdapterFormatError")
    arrived = {seen.path for seen in hub.requests("PUT", BLOBS) if seen.status == 200}
    fault.times = 0
    hub.seen.clear()
    client("push", name="fresh", repo="alice/broken")
    assert history(hub, "alice/broken") == ["Upload LARA adapter", "initial commit"]
    sent = {seen.path for seen in hub.requests("PUT", BLOBS)}
    assert not arrived & sent
    assert client("load", name="b", repo="alice/broken")["step"] == 5


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, client):
    client("make", name="fresh", steps=8)
    hub.fail("POST", "/commit/", lose=True)
    fails(client, "push", "completely or not at all", "push again", name="fresh", repo="alice/lost")
    assert history(hub, "alice/lost") == ["Upload LARA adapter", "initial commit"]
    url = client("push", name="fresh", repo="alice/lost")
    assert history(hub, "alice/lost") == ["Upload LARA adapter", "initial commit"]
    assert url.endswith(hub.store.repos["alice/lost"].branches["main"])


def test_somebody_else_pushes_meanwhile(hub, client):
    client("push", name="a", repo="alice/race")
    client("make", name="fresh", steps=6)
    hub.fail("POST", "/commit/", call=lambda: hub.put("alice/race", {"theirs.txt": b"first"}))
    fails(client, "push", "changed by somebody else", "push again", name="fresh", repo="alice/race")
    assert history(hub, "alice/race") == ["files", "Upload LARA adapter", "initial commit"]
    client("push", name="fresh", repo="alice/race")
    assert hub.store.repos["alice/race"].files()["theirs.txt"] == b"first"


def test_no_server_at_all(tmp_path):
    from hub.client import Client

    with Client("http://127.0.0.1:9", tmp_path) as client:
        client("make", name="a")
        fails(client, "load", "or the connection broke", "http://127.0.0.1:9", name="b", repo="alice/x")
        fails(client, "push", "or the connection broke", "push again", name="a", repo="alice/x")
