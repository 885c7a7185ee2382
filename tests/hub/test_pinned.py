"""What was used is recorded by commit, and nothing that is downloaded is ever run."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2]
BASE = {"repo_id": "nvidia/base", "revision": "1" * 40}
TOLD = {"_name_or_path": BASE["repo_id"], "_commit_hash": BASE["revision"]}


def config_of(hub, repo, name="lara_config.json"):
    return json.loads(hub.store.repos[repo].files()[name])


def test_policy_and_lam_are_recorded_by_commit(hub, client):
    client("make_lam", name="lam", seed=8)
    commit = client("push_lam", name="lam", repo="alice/pin-lam").rpartition("/")[2]
    client("load_lam", name="from-hub", repo="alice/pin-lam")
    client("make", name="pinned", lam="from-hub", told=TOLD, steps=1)
    client("push", name="pinned", repo="alice/pinned")
    lam = {"repo_id": "alice/pin-lam", "revision": commit}
    assert config_of(hub, "alice/pinned")["origins"] == {"policy": BASE, "lam": lam}
    assert config_of(hub, "alice/pinned", "lam/config.json")["origin"] == lam
    # loaded again, trained on and pushed again it still says where it came from; the base may be a local copy by then
    client("warnings")
    for told in (TOLD, {"_name_or_path": "/home/me/base"}):
        assert client("load", name="b", repo="alice/pinned", told=told)["origins"] == {"policy": BASE, "lam": lam}
    assert client("warnings") == []
    client("push", name="b", repo="alice/pinned-2")
    assert config_of(hub, "alice/pinned-2")["origins"] == {"policy": BASE, "lam": lam}
    assert "/home" not in json.dumps(config_of(hub, "alice/pinned-2"))


def test_another_version_of_the_policy_is_warned_of(hub, client):
    client("make", name="pinned", told=TOLD)
    client("push", name="pinned", repo="alice/other-base")
    client("warnings")
    client("load", name="b", repo="alice/other-base", told={**TOLD, "_commit_hash": "2" * 40})
    (warning,) = client("warnings")
    assert "nvidia/base at " + "1" * 40 in warning
    assert "2" * 40 in warning


@pytest.mark.parametrize(
    "told", [{"_name_or_path": "outputs/run", "_commit_hash": None}, {"pretrained_path": "/data/x"}, {}]
)
def test_a_local_path_is_not_recorded(hub, client, told):
    client("make", name="local", told=told)
    client("push", name="local", repo="alice/local")
    assert config_of(hub, "alice/local")["origins"] == {}


def test_a_policy_that_names_only_its_repository(hub, client):
    """As LeRobot's do (pretrained_path): the cache tells which commit was downloaded."""
    hub.put("alice/base", {"config.json": b'{"type": "pi05"}'})
    commit = hub.store.repos["alice/base"].branches["main"]
    client("fetch", repo="alice/base", file="config.json")
    client("make", name="named", told={"pretrained_path": "alice/base"})
    client("push", name="named", repo="alice/named")
    assert config_of(hub, "alice/named")["origins"] == {"policy": {"repo_id": "alice/base", "revision": commit}}
    # with two commits in the cache nobody can tell which one the policy is: nothing is better than a guess
    hub.put("alice/base", {"config.json": b'{"type": "pi05", "more": 1}'})
    client("fetch", repo="alice/base", file="config.json")
    client("make", name="named", told={"pretrained_path": "alice/base"})
    client("push", name="named", repo="alice/named")
    assert config_of(hub, "alice/named")["origins"] == {}


# ---------------------------------------------------------------------- image encoders


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The files of a tiny vision backbone."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=64, patch_size=8
    )
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_image_encoder_is_pinned_to_its_commit(hub, client, vit):
    hub.put("alice/vit", vit)
    first = hub.store.repos["alice/vit"].branches["main"]
    described = client("describe_encoder", name="alice/vit")
    assert described["image_encoder_revision"] == first
    unpinned = {**described, "image_encoder_revision": None, "difference_input": False}
    client("make_lam", name="frozen", **unpinned)
    client("push_lam", name="frozen", repo="alice/frozen")
    assert config_of(hub, "alice/frozen", "config.json")["image_encoder_revision"] == first
    assert f"alice/vit at {first}" in hub.store.repos["alice/frozen"].files()["README.md"].decode()
    hub.put("alice/vit", {"config.json": b"{}", "model.safetensors": b"something else by now"})
    told = client("load_lam", name="again", repo="alice/frozen")
    assert told["encoder"] == first
    client("make", name="pinned", lam="again")
    client("push", name="pinned", repo="alice/with-frozen")
    assert config_of(hub, "alice/with-frozen")["origins"]["image_encoder"] == {
        "repo_id": "alice/vit",
        "revision": first,
    }


def test_an_image_encoder_of_pickles_is_loaded_from_the_hubs_conversion_or_not_at_all(hub, client, vit):
    hub.put("alice/pickles", {"config.json": vit["config.json"], "pytorch_model.bin": b"not opened"})
    title = "Adding `safetensors` variant of this model"
    hub.put("alice/pickles", vit, "refs/pr/1", f"mallory: {title}")  # anybody can open one
    failed = client.refused("describe_encoder", name="alice/pickles")
    assert failed.kinds[0] == "LaraArgumentError", failed.trace
    assert "cannot be loaded" in failed.message
    hub.put("alice/pickles", vit, "refs/pr/2", f"SFconvertbot: {title}")
    proposed = hub.store.repos["alice/pickles"].branches["refs/pr/2"]
    assert client("describe_encoder", name="alice/pickles")["image_encoder_revision"] == proposed
    assert client("describe_encoder", name="alice/pickles", revision=proposed)["image_encoder_revision"] == proposed
    assert not hub.requests("GET", "pytorch_model")


def _with_code(content, canary):
    content = {**content, "auto_map": {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}}
    return {"config.json": json.dumps(content).encode(), "modeling.py": f"open({str(canary)!r}, 'w')\n".encode()}


def test_an_image_encoder_with_code_of_its_own_is_refused(hub, client, vit, tmp_path):
    """Also at a terminal: transformers would ask there whether to run it, one key away from a stranger's code."""
    canary = tmp_path / "executed"
    hub.put("alice/evil", {**vit, **_with_code({"model_type": "evil"}, canary)})
    failed = client.refused("describe_encoder", name="alice/evil")
    assert failed.kinds[0] == "LaraArgumentError"
    assert "is code in that repository" in failed.message
    client("make_lam", name="innocent")
    client("push_lam", name="innocent", repo="alice/evil-lam")
    config = {**config_of(hub, "alice/evil-lam", "config.json"), "image_encoder": "alice/evil"}
    hub.put("alice/evil-lam", {"config.json": json.dumps(config).encode()})
    assert "is code in that repository" in client.refused("load_lam", name="b", repo="alice/evil-lam").message
    assert not canary.exists()
    assert not hub.requests("GET", r"modeling\.py")


def test_code_beside_a_known_backbone_is_left_alone(hub, client, vit, tmp_path):
    canary = tmp_path / "executed"
    hub.put("alice/vit-code", {**vit, **_with_code(json.loads(vit["config.json"]), canary)})
    assert client("describe_encoder", name="alice/vit-code")["encoder_width"] == 16
    assert not canary.exists()
    assert not hub.requests("GET", r"modeling\.py")


def test_code_beside_an_adapter_is_not_even_downloaded(hub, client, tmp_path):
    canary = tmp_path / "executed"
    client("push", name="a", repo="alice/code")
    settings = _with_code({"model_type": "evil"}, canary)
    hub.put(
        "alice/code", {**settings, "lara_adapter.py": settings["modeling.py"], "__init__.py": settings["modeling.py"]}
    )
    assert client("load", name="b", repo="alice/code")["step"] == 2
    assert not [name for name in client("cached", repo="alice/code") if name.endswith(".py")]
    assert not canary.exists()


def test_the_package_has_no_way_to_run_downloaded_code():
    forbidden = {"trust_remote_code", "get_class_from_dynamic_module", "torch.hub", "runpy"}
    found = []
    for path in sorted([*(PACKAGE / "lara_adapter").rglob("*.py"), *(PACKAGE / "integrations").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, field, None) for field in ("arg", "id", "attr", "name", "module")}
            if isinstance(node, ast.Constant):
                names.add(
                    node.value if isinstance(node.value, str) else None
                )  # a key of what becomes keyword arguments
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval"):
                found.append(f"{path.name}:{node.lineno} {node.func.id}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                safe = [k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", None) is True]
                found += [] if safe else [f"{path.name}:{node.lineno} {ast.unparse(node.func)}"]
            found += [f"{path.name}:{getattr(node, 'lineno', 0)} {name}" for name in names & forbidden]
    assert found == []
