"""A row given for one call, and blocks that the user named, survive saving."""

from __future__ import annotations

import json
import logging

import pytest
from helpers.toys import Block, BypassPolicy, DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import AdapterFormatError, PolicySpec, attach_lara, load_lara, policies

WALKED = PolicySpec("walked", blocks="layers", tap="norm", final_norm="norm", action_tokens="first", draws="tile")


def frames(observation):
    return observation["frames"]


def saved(policy: nn.Module, folder, **arguments):
    lara = attach_lara(policy, OwnLam(), **arguments)
    lara.save_pretrained(folder)  # says that it was not trained
    return lara


def test_a_row_given_for_one_call(tmp_path, caplog):
    lara = saved(BypassPolicy(), tmp_path, spec=WALKED, frames=frames)
    policy = BypassPolicy().train()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        loaded = load_lara(policy, tmp_path, lam=OwnLam(), frames=frames)
    assert not caplog.records
    assert loaded.spec == WALKED
    assert (
        (loaded.config.tap, loaded.config.tap_kind)
        == (lara.config.tap, "input")
        == ("layers.2.input_layernorm", "input")
    )
    assert loaded.config.row == lara.config.row
    again = load_lara(BypassPolicy(), tmp_path, lam=OwnLam(), frames=frames, layer=1)
    assert again.config.tap == "layers.1.input_layernorm"


def test_another_row_or_other_blocks_at_loading(tmp_path):
    saved(BypassPolicy(), tmp_path, spec=WALKED, frames=frames)
    plain = PolicySpec("plain", blocks="layers", action_tokens="last")
    loaded = load_lara(BypassPolicy(), tmp_path, lam=OwnLam(), frames=frames, spec=plain)
    assert (loaded.spec, loaded.config.tap) == (plain, "layers.1")
    policy = BypassPolicy()
    policy.other = nn.ModuleList(Block() for _ in range(4))
    loaded = load_lara(policy, tmp_path, lam=OwnLam(), frames=frames, blocks="other")
    assert (loaded.spec.draws, loaded.spec.action_tokens, loaded.config.tap) == ("tile", "first", "other.1")


def test_a_callable_of_the_row_is_asked_for(tmp_path):
    spec = PolicySpec("own", action_tokens=lambda batch: batch["is_action"])
    saved(DitPolicy(), tmp_path, spec=spec)
    with pytest.raises(AdapterFormatError, match=r"for \['spec'\], which cannot be stored; .*spec="):
        load_lara(DitPolicy(), tmp_path, lam=OwnLam())
    assert load_lara(DitPolicy(), tmp_path, lam=OwnLam(), spec=spec).spec == spec


def test_the_tables_own_row_is_not_written(tmp_path, monkeypatch):
    row = PolicySpec("toy", ("helpers:DitPolicy",), "transformer_blocks", draws="tile")
    monkeypatch.setattr(policies, "_TABLE", [row])
    for given in (None, row):
        lara = saved(DitPolicy(), tmp_path, spec=given)
        assert lara.config.row is None
        assert json.loads((tmp_path / "lara_config.json").read_text())["row"] is None
        assert load_lara(DitPolicy(), tmp_path, lam=OwnLam()).spec is row


def test_blocks_named_on_a_known_policy(tmp_path, monkeypatch):
    row = PolicySpec("toy", ("helpers:DitPolicy",), "transformer_blocks", draws="tile", frames="own.frames")
    monkeypatch.setattr(policies, "_TABLE", [row])

    def policy():
        host = DitPolicy().train()
        host.other = nn.ModuleList(Block() for _ in range(3))
        return host

    lara = saved(policy(), tmp_path, blocks="other", layer=-1)
    assert (lara.config.policy_family, lara.config.blocks, lara.spec.draws) == ("toy", "other", "tile")
    loaded = load_lara(policy(), tmp_path, lam=OwnLam())
    assert (loaded.config.tap, loaded.config.frames, loaded.spec.draws) == ("other.2", "own.frames", "tile")


def test_blocks_named_on_a_policy_whose_row_reads_norms(tmp_path, monkeypatch):
    row = PolicySpec("walked", ("helpers:BypassPolicy",), "layers", tap="norm", final_norm="norm")
    monkeypatch.setattr(policies, "_TABLE", [row])

    def policy():
        host = BypassPolicy().train()
        host.other = nn.ModuleList(Block() for _ in range(3))
        return host

    saved(policy(), tmp_path, blocks="other", layer=-1, frames=frames)
    loaded = load_lara(policy(), tmp_path, lam=OwnLam(), frames=frames)
    assert (loaded.config.tap, loaded.config.tap_kind, loaded.config.row) == ("other.2", "output", None)


@pytest.mark.parametrize("name", ["transformer_blocks.1,transformer_blocks.2", "net.block*"])
def test_names_of_blocks(name, tmp_path):
    def policy():
        host = DitPolicy().train()
        if "*" in name:
            host.net = nn.Module()
            for i in range(5):
                host.net.add_module(f"block{i}", host.transformer_blocks[i])
        return host

    lara = saved(policy(), tmp_path, blocks=name, layer=-1)
    host = policy()
    loaded = load_lara(host, tmp_path, lam=OwnLam())
    assert (loaded.config.blocks, loaded.config.tap) == (name, lara.config.tap)
    assert host(make_batch())["loss"].requires_grad


@pytest.mark.parametrize("row", [{"name": 3}, {}, [], {"name": "x", "tap": "up"}, {"name": "x", "owner": 1}], ids=str)
def test_a_foreign_row_is_refused(row, tmp_path):
    saved(DitPolicy(), tmp_path)
    path = tmp_path / "lara_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "row": row}))
    with pytest.raises(AdapterFormatError, match="row"):
        load_lara(DitPolicy(), tmp_path, lam=OwnLam())
