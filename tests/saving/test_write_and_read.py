"""Saving an adapter and attaching it again."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from helpers.toys import DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import (
    AdapterFormatError,
    Contrastive,
    HubError,
    LaraAdapter,
    LatentActionConfig,
    LatentActionModel,
    PolicySpec,
    TapNotFound,
    attach_lara,
    load_lara,
)
from lara_adapter.schedules import Warmup


def tiny_lam(**changes):
    return LatentActionModel(LatentActionConfig.tiny(**changes))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    policy = DitPolicy().train()
    lara = attach_lara(
        policy, tiny_lam(), layer=-2, token="mean_valid", projector="linear", alignment=Contrastive(0.2),
        align_weight=Warmup(0.1, 5), lam_weight=0.02, lam_grad_scale=0.3, frames_optional=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        policy(make_batch(seed=seed))["loss"].backward()
        optimizer.step()
    lara.save_pretrained(tmp_path / "adapter")
    return policy, lara, tmp_path / "adapter"


def test_files(saved):
    _, _, folder = saved
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "README.md", "lam/config.json", "lam/model.safetensors", "lara_adapter.safetensors", "lara_config.json",
    ]  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "library_name: lara-adapter" in card
    assert "pipeline_tag: robotics" in card
    assert str(folder) not in card


def test_a_saved_adapter_trains_on_bit_identically(saved):
    policy, lara, folder = saved
    other = DitPolicy().train()
    other.load_state_dict({k: v for k, v in policy.state_dict().items() if not k.startswith("lara.")})
    again = load_lara(other, folder)
    assert again.config == lara.config
    assert again.step == 3
    results = []
    for model in (policy, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(4)
        losses = []
        for seed in range(3):
            optimizer.zero_grad()
            loss = model(make_batch(seed=10 + seed))["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, model.state_dict()))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


def test_saving_what_never_trained_is_said_once(saved, tmp_path, batch, caplog):
    def said():
        return [r.message for r in caplog.records if "without one training step" in r.message]

    policy = DitPolicy().train()
    lara = attach_lara(policy, OwnLam())
    for _ in range(2):
        lara.save_pretrained(tmp_path / "a")
    assert len(said()) == 1
    assert "projector and LAM are as they were attached" in said()[0]
    caplog.clear()
    _, _, folder = saved
    again = load_lara(DitPolicy().train(), folder)
    again.step = 0  # restored weights are trained ones
    again.save_pretrained(tmp_path / "b")
    idle = attach_lara(DitPolicy(), OwnLam(), align_weight=0, lam_weight=0)
    idle.save_pretrained(tmp_path / "c")
    double = DitPolicy().train()
    other = attach_lara(double, OwnLam())
    double.load_state_dict(policy.state_dict())
    other.save_pretrained(tmp_path / "d")
    policy(batch)
    lara.save_pretrained(tmp_path / "e")
    assert not said()


def test_overrides(saved):
    policy, _, folder = saved
    policy.lara.detach()
    lara = LaraAdapter.from_pretrained(policy, folder, train_lam=False, alignment="cosine")
    assert not lara.config.train_lam
    assert lara.config.alignment == {"name": "cosine"}
    assert lara.config.token == "mean_valid"


def test_what_cannot_be_stored_is_asked_for(tmp_path):
    policy = DitPolicy().train()
    lara = attach_lara(policy, OwnLam(), token=lambda h, b: h[:, -1], alignment=lambda p, z: (p - z).square().mean(1))
    policy(make_batch())
    lara.save_pretrained(tmp_path / "a")
    lara.detach()
    with pytest.raises(AdapterFormatError, match=r"callables or modules for \['alignment', 'token'\]"):
        load_lara(policy, tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="does not have a latent action model"):
        load_lara(policy, tmp_path / "a", token="last", alignment="cosine")
    again = load_lara(policy, tmp_path / "a", token="last", alignment="cosine", lam=OwnLam())
    assert torch.equal(again.projector[0].weight, lara.projector[0].weight)
    assert again.step == 1


def test_saving_again_replaces_and_keeps_a_users_files(saved):
    _, lara, folder = saved
    (folder / "notes.txt").write_text("mine")
    lara.step = 99
    lara.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert load_lara(DitPolicy(), folder).step == 99


def _edit(folder, **changes):
    path = folder / "lara_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_folders(saved):
    _, _, folder = saved

    def broken(message, change, error=AdapterFormatError):
        copy = folder.parent / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        policy = DitPolicy()
        with pytest.raises(error, match=message):
            load_lara(policy, copy)
        assert not hasattr(policy, "lara"), message
        assert "forward" not in policy.__dict__

    weights = "lara_adapter.safetensors"
    broken("lara_config.json is missing", lambda f: (f / "lara_config.json").unlink())
    broken("schema_version=9.*upgrade", lambda f: _edit(f, schema_version=9))
    broken(f"{weights} is missing", lambda f: (f / weights).unlink())
    broken("truncated", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-100]))
    broken("sha256 differs", lambda f: _flip_last_byte(f / weights))
    broken("truncated", lambda f: (f / "lam" / "model.safetensors").write_bytes(b"\x00" * 20))
    broken("lam", lambda f: (f / "lam" / "config.json").unlink())
    broken("is not a weight schedule", lambda f: _edit(f, align_weight={"schedule": "exec"}))
    broken("is not an alignment", lambda f: _edit(f, alignment={"name": "l2"}))
    broken("blocks='elsewhere'", lambda f: _edit(f, blocks="elsewhere"), TapNotFound)
    broken("depth 9, but here it is 5", lambda f: _edit(f, depth=9))
    broken("layer=7, but transformer_blocks has 5 blocks", lambda f: _edit(f, layer=7), TapNotFound)


def test_another_tap_than_the_saved_one_is_reported(tmp_path, lam, caplog):
    spec = PolicySpec("once", blocks="transformer_blocks", tap="norm", norm="norm1", final_norm="action_out")
    attach_lara(DitPolicy().train(), lam, -2, spec=spec).save_pretrained(tmp_path / "a")
    load_lara(DitPolicy().train(), tmp_path / "a", lam=lam, spec=spec)
    load_lara(DitPolicy().train(), tmp_path / "a", lam=lam, blocks="transformer_blocks")  # asked for
    load_lara(DitPolicy().train(), tmp_path / "a", lam=lam)
    assert "was saved with the state at" not in caplog.text
    _edit(tmp_path / "a", row=None)  # as before rows were saved
    load_lara(DitPolicy().train(), tmp_path / "a", lam=lam)
    assert (
        "was saved with the state at transformer_blocks.4.norm1, but here it is read at transformer_blocks.3"
        in caplog.text
    )


def _flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_lam_of_another_latent_size(saved):
    _, _, folder = saved
    policy = DitPolicy()
    with pytest.raises(AdapterFormatError, match="a LAM of latent width 256, but here it is 8"):
        load_lara(policy, folder, lam=OwnLam())
    assert not hasattr(policy, "lara")


def test_a_policy_of_another_width(saved):
    _, _, folder = saved
    with pytest.raises(AdapterFormatError, match="whose DiT has width 16, but here it is 24"):
        load_lara(DitPolicy(width=24), folder)


def test_foreign_tensors(saved):
    from lara_adapter.storage.files import read_tensors, write_tensors
    from lara_adapter.storage.hub import sha256 as _sha256

    _, _, folder = saved
    path = folder / "lara_adapter.safetensors"
    tensors = read_tensors(path)
    for change, message in (
        ({**tensors, "evil": torch.zeros(1)}, r"unexpected tensors \['evil'\]"),
        ({k: v for k, v in tensors.items() if k != "step"}, "lacks one of step, direction, seed"),
        ({**tensors, "projector.weight": torch.zeros(3, 3)}, r"weight has shape \[3, 3\]"),
    ):
        write_tensors(path, change)
        _edit(
            folder, files={**json.loads((folder / "lara_config.json").read_text())["files"], path.name: _sha256(path)}
        )
        with pytest.raises(AdapterFormatError, match=message):
            load_lara(DitPolicy(), folder)


@pytest.mark.parametrize("where", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist(where):
    with pytest.raises(AdapterFormatError, match="does not exist"):
        load_lara(DitPolicy(), where)


def test_the_hub_out_of_reach():
    with pytest.raises(HubError, match="the Hub is not asked"):
        load_lara(DitPolicy(), "user/adapter")


def test_a_full_disk_leaves_the_saved_adapter_as_it_was(saved, monkeypatch):
    _, lara, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lara_adapter.saving.write.write_json", full)
    lara.step = 50
    with pytest.raises(OSError, match="No space left"):
        lara.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]


def test_lora_of_the_policy_is_saved_and_restored(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["mlp.0", "mlp.2"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    base = DitPolicy()
    policy = peft.get_peft_model(base, config).train()
    lara = attach_lara(policy, tiny_lam())
    assert lara.check(make_batch()).ok
    lara.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "policy_lora" / "adapter_config.json").is_file()
    assert not (tmp_path / "a" / "adapter_config.json").exists()  # transformers probes for that name
    fresh = DitPolicy()
    with pytest.raises(AdapterFormatError, match=r"holds LoRA weights of the policy; wrap it first"):
        load_lara(fresh, tmp_path / "a")
    wrapped = peft.get_peft_model(DitPolicy(), config)
    load_lara(wrapped, tmp_path / "a")
    ours = {n: p for n, p in policy.named_parameters() if "lora_" in n}
    theirs = dict(wrapped.named_parameters())
    assert ours
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_projector_module_round_trip(tmp_path):
    head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 256))
    lara = attach_lara(DitPolicy().train(), tiny_lam(), projector=head)
    lara.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFormatError, match=r"\['projector'\]"):
        load_lara(DitPolicy(), tmp_path / "a")
    again = load_lara(DitPolicy(), tmp_path / "a", projector=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 256)))
    assert torch.equal(again.projector[1].weight, head[1].weight)


def test_a_download_sums_the_files_that_were_asked_for_and_no_others(tmp_path, monkeypatch):
    import huggingface_hub

    from lara_adapter.storage.hub import download

    folder, blobs = tmp_path / "snapshots" / ("0" * 40), tmp_path / "blobs"
    for name in ("config.json", "lam/model.safetensors", "policy.safetensors"):
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"damaged" if name == "policy.safetensors" else name.encode())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(folder))
    assert download("user/name", None, ["config.json", "lam/*"], "model") == folder
    with pytest.raises(HubError, match=r"policy\.safetensors is damaged"):
        download("user/name", None, ["config.json", "*.safetensors"], "model")
