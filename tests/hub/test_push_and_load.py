"""Adapters and latent action models go to a Hub and come back: the real client, over HTTP, in processes of their own."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

ADAPTER = ["README.md", "lam/config.json", "lam/model.safetensors", "lara_adapter.safetensors", "lara_config.json"]
BLOBS = r"^/upload/"


def files(hub, repo, revision="main"):
    return sorted(set(hub.store.repos[repo].files(revision)) - {".gitattributes"})


def messages(hub, repo, revision="main"):
    return [commit.message for commit in hub.store.repos[repo].history(revision)]


def test_a_pushed_adapter_trains_on_bit_identically_in_a_fresh_process(hub, client, offline, tmp_path):
    client("make", name="trained", steps=2)
    weights = str(tmp_path / "policy.safetensors")
    client("save_policy", name="trained", path=weights)
    url = client("push", name="trained", repo="alice/round-trip")
    commit = hub.store.repos["alice/round-trip"].branches["main"]
    assert url == f"{hub.url}/alice/round-trip/commit/{commit}"
    assert files(hub, "alice/round-trip") == ADAPTER
    assert messages(hub, "alice/round-trip") == ["Upload LARA adapter", "initial commit"]

    before = client("digest", name="trained")
    told = client("load", name="online", repo="alice/round-trip", weights=weights)
    assert told == {"step": 2, "origins": {}, "token": "mean_valid"}
    assert client("digest", name="online") == before

    hub.seen.clear()  # from here on the network is not touched: the commit, and the branch, are in the cache
    for revision in (commit, None, "main"):
        assert offline("load", name="again", repo="alice/round-trip", revision=revision, weights=weights)["step"] == 2
    assert offline("digest", name="again") == before
    assert hub.seen == []

    never_saved = client("train", name="trained", steps=3, seed=5)
    assert len(set(never_saved)) == 3
    assert offline("train", name="again", steps=3, seed=5) == never_saved
    assert offline("digest", name="again") == client("digest", name="trained") != before


def test_lora_of_the_policy_travels_along(hub, client, offline):
    pytest.importorskip("peft")
    client("make", name="lora", steps=2, lora=True)
    client("push", name="lora", repo="alice/lora")
    assert files(hub, "alice/lora") == sorted(
        [*ADAPTER, "policy_lora/adapter_config.json", "policy_lora/adapter_model.safetensors"]
    )
    client("load", name="online", repo="alice/lora", lora=True)
    commit = hub.store.repos["alice/lora"].branches["main"]
    offline("load", name="lora", repo="alice/lora", revision=commit, lora=True)
    assert offline("digest", name="lora") == client("digest", name="lora")
    assert offline("train", name="lora", steps=3, seed=6) == client("train", name="lora", steps=3, seed=6)


def test_a_latent_action_model_round_trip(hub, client, offline):
    client("make_lam", name="lam", seed=3)
    url = client("push_lam", name="lam", repo="alice/lam")
    commit = url.rpartition("/")[2]
    assert files(hub, "alice/lam") == ["README.md", "config.json", "model.safetensors"]
    card = hub.store.repos["alice/lam"].files()["README.md"].decode()
    assert "library_name: lara-adapter" in card
    assert 'from_pretrained("alice/lam")' in card
    client("make_lam", name="other", seed=4)
    client("push_lam", name="other", repo="alice/lam")  # main moves on; the commit does not
    told = client("load_lam", name="back", repo="alice/lam", revision=commit)
    assert told["origin"] == {"repo_id": "alice/lam", "revision": commit}
    assert client("same_lams", one="lam", other="back")
    client("load_lam", name="newest", repo="alice/lam")
    assert client("same_lams", one="other", other="newest")
    hub.seen.clear()
    assert offline("load_lam", name="back", repo="alice/lam", revision=commit) == told
    assert hub.seen == []


def test_a_card_that_somebody_wrote_for_a_latent_action_model_stays(hub, client):
    hub.put("alice/lam-card", {"README.md": b"---\nlicense: mit\n---\nMine."})
    client("make_lam", name="lam", seed=3)
    client("push_lam", name="lam", repo="alice/lam-card")
    assert hub.store.repos["alice/lam-card"].files()["README.md"] == b"---\nlicense: mit\n---\nMine."


def test_an_update_is_one_commit_that_deletes_what_is_ours_and_gone(hub, client):
    theirs = {"notes.txt": b"mine", "policy/model.safetensors": b"big", "lam.txt": b"not in lam/"}
    old = {
        "policy_lora/adapter_config.json": b"{}",
        "policy_lora/adapter_model.safetensors": b"old",
        "lam/old.json": b"{}",
    }
    hub.put("alice/update", {**theirs, **old})
    client("push", name="a", repo="alice/update", commit_message="second")
    assert messages(hub, "alice/update") == ["second", "files", "initial commit"]
    assert files(hub, "alice/update") == sorted([*ADAPTER, *theirs])
    hub.seen.clear()
    client("make", name="copy", steps=2)
    client("set_step", name="copy", step=99)
    client("push", name="copy", repo="alice/update", commit_message="third")
    assert messages(hub, "alice/update")[:2] == ["third", "second"]
    assert len(hub.requests("PUT", BLOBS)) == 1  # the file with the counter; not the unchanged LAM
    assert hub.store.repos["alice/update"].files()["notes.txt"] == b"mine"


def test_pushing_the_same_again_makes_no_commit(hub, client):
    first = client("push", name="a", repo="alice/same")
    assert client("push", name="a", repo="alice/same") == first
    assert messages(hub, "alice/same") == ["Upload LARA adapter", "initial commit"]


def test_only_the_adapters_files_are_downloaded(hub, client):
    client("push", name="a", repo="alice/beside")
    theirs = {"model-00001-of-00001.safetensors": b"x" * 10**6, "modeling.py": b"raise SystemExit", "notes.txt": b""}
    hub.put("alice/beside", theirs)
    hub.seen.clear()
    client("load", name="b", repo="alice/beside")
    assert client("cached", repo="alice/beside") == [name for name in ADAPTER if name != "README.md"]
    assert not [seen.path for seen in hub.seen if re.search(r"model-0|modeling|notes", seen.path)]


def test_large_files_in_parts(hub, client):
    hub.part_size = 50_000
    client("make", name="other", steps=3)
    client("push", name="other", repo="alice/parts")
    assert len(hub.requests("PUT", BLOBS)) == 3  # two parts of the LAM, and the projector
    assert len(hub.requests("POST", "^/complete/")) == 1
    assert client("load", name="b", repo="alice/parts")["step"] == 3


@pytest.mark.parametrize(
    ("repo", "asked", "private"),
    [("alice/p1", True, True), ("alice/p2", None, False), ("lab/p3", None, True), ("lab/p4", False, False)],
)
def test_visibility_is_the_owners_default_unless_asked_for(hub, client, repo, asked, private):
    """An organisation may make every new repository private: `private=None` must not overrule that."""
    options = {} if asked is None else {"private": asked}
    client("push", name="a", repo=repo, **options)
    assert hub.store.repos[repo].private is private


def test_branches(hub, client):
    client("push", name="a", repo="alice/branches")
    client("make", name="longer", steps=3)
    client("push", name="longer", repo="alice/branches", revision="longer-run")  # made from main, as it was not there
    client("push", name="longer", repo="alice/branches", revision="longer-run", commit_message="no change")
    assert messages(hub, "alice/branches", "longer-run") == ["Upload LARA adapter"] * 2 + ["initial commit"]
    assert client("load", name="b", repo="alice/branches", revision="longer-run")["step"] == 3
    assert client("load", name="b", repo="alice/branches")["step"] == 2
    refused = client.refused("push", name="a", repo="alice/branches", revision="refs/pr/9")
    assert "HubError" in refused.kinds
    assert "no branch, tag or commit 'refs/pr/9'" in refused.message


def test_a_branch_name_with_a_slash(hub, client):
    client("push", name="a", repo="alice/slash", revision="runs/one")
    assert client("load", name="b", repo="alice/slash", revision="runs/one")["step"] == 2


def test_of_several_ranks_one_uploads(hub, client, offline, tmp_path):
    offline("make", name="a", steps=2)
    hub.seen.clear()
    with ThreadPoolExecutor() as pool:  # rank 1 may not use the network: it would raise
        urls = [
            pool.submit(process, "push_as_rank", name="a", repo="alice/ranks", rank=rank, meet=str(tmp_path / "meet"))
            for rank, process in enumerate((client, offline))
        ]
    assert urls[0].result(60).startswith(hub.url)
    assert urls[1].result(60) == ""
    assert messages(hub, "alice/ranks") == ["Upload LARA adapter", "initial commit"]
    assert client("load", name="b", repo="alice/ranks")["step"] == 2


def test_the_token_of_the_call_is_used(hub, client, acting_as):
    acting_as(None)
    client("push", name="a", repo="bob/token", token="hf_bob")
    assert {seen.user for seen in hub.seen if not seen.path.startswith("/upload/")} == {"bob"}
    assert json.loads(hub.store.repos["bob/token"].files()["lara_config.json"])["schema_version"] == 1


def test_the_token_never_leaves_the_hub(hub, client):
    client("push", name="a", repo="alice/secret", private=True)
    client("load", name="b", repo="alice/secret")
    elsewhere = [seen for seen in hub.seen if seen.path.startswith(("/cdn/", "/upload/"))]
    assert elsewhere
    assert {seen.token for seen in elsewhere} == {None}
