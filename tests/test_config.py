import json
from dataclasses import replace

import pytest

from lara_adapter import AdapterFormatError, LaraConfig, PolicySpec, policies
from lara_adapter.config import row_to_json

CONFIG = LaraConfig(3, 5, "blocks", "blocks.2", "output", 16, 256)


def test_json_round_trip():
    assert LaraConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_unknown_settings_of_our_schema_are_ignored_with_a_warning(caplog):
    assert LaraConfig.from_dict({**CONFIG.to_dict(), "new_thing": 1, "_target_": "os.system"}) == CONFIG
    assert "unknown settings ignored: ['_target_', 'new_thing']" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "reads up to 1; upgrade"),
        ({"schema_version": None}, "not an adapter of lara_adapter"),
        ({"schema_version": True}, "not an adapter of lara_adapter"),
        ({"layer": "3"}, "layer='3', but int is expected"),
        ({"layer": True}, "layer=True, but int is expected"),
        ({"alignment": "cosine"}, "alignment='cosine', but dict or NoneType"),
        ({"train_lam": 1}, "train_lam=1, but bool"),
    ],
)
def test_foreign_content(change, message):
    with pytest.raises(AdapterFormatError, match=message):
        LaraConfig.from_dict({**CONFIG.to_dict(), **change})


def test_missing_settings():
    content = CONFIG.to_dict()
    del content["tap"], content["depth"]
    with pytest.raises(AdapterFormatError, match=r"lacks \['depth', 'tap'\]"):
        LaraConfig.from_dict(content)


# ---------------------------------------------------------------------- blocks and rows

ROW = PolicySpec(
    "mine", ("package:Class",), "net.block*", tap="norm", final_norm="norm", action_tokens="first", owner="net",
    draws="interleave", entry="compute_loss", action="a", mask="m", padding="p", loss="l", state=1, run=-1,
    layout="sequence",
)  # fmt: skip


def saved(**changes) -> LaraConfig:
    return LaraConfig.from_dict(json.loads(json.dumps(replace(CONFIG, **changes).to_dict())))


@pytest.fixture
def known(monkeypatch):
    rows = [PolicySpec("known", ("p:C",), "blocks"), PolicySpec("searched", ("p:D",))]
    monkeypatch.setattr(policies, "_TABLE", rows)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("family", "blocks", "expected"),
    [
        ("known", "blocks", None),
        ("known", "other", "other"),
        ("searched", "blocks", "blocks"),
        ("generic", "blocks", "blocks"),
        ("nobody registered", "blocks", "blocks"),
    ],
)
def test_the_saved_blocks_are_an_argument_unless_they_are_the_rows(family, blocks, expected):
    arguments = saved(policy_family=family, blocks=blocks).arguments()
    assert arguments["blocks"] == expected
    assert "spec" not in arguments


@pytest.mark.parametrize("tokens", ["first", 7, "action_token_id"])
def test_a_row_survives(tokens):
    row = replace(ROW, action_tokens=tokens)
    config = saved(row=row_to_json(row), policy_family="mine", blocks="net.block*")
    assert config.arguments()["spec"] == row
    assert config.arguments()["blocks"] is None
    assert saved(row=row_to_json(row), blocks="other").arguments()["blocks"] == "other"


def test_a_callable_of_a_row_cannot_be_stored():
    config = saved(row=row_to_json(replace(ROW, action_tokens=lambda batch: batch["is_action"])), blocks="net.block*")
    assert config.row["action_tokens"] is None
    assert config.arguments()["spec"] is None


def test_an_earlier_file_has_no_row():
    content = CONFIG.to_dict()
    del content["row"]
    assert LaraConfig.from_dict(content) == CONFIG


def test_unknown_settings_of_a_row_are_ignored_with_a_warning(caplog):
    assert saved(row={**row_to_json(ROW), "later": 1}).arguments()["spec"] == ROW
    assert "row: unknown settings ignored: ['later']" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "row: name=None, but str is expected"),
        ({"classes": "package:Class"}, "classes='package:Class', but list"),
        ({"classes": [1]}, r"classes=\[1\], but a list of str"),
        ({"classes": ["Class"]}, "out of range.*'package:ClassName'"),
        ({"tap": "middle"}, "out of range.*tap='middle'"),
        ({"tap": 3}, "tap=3, but str"),
        ({"draws": True}, "draws=True"),
        ({"action_tokens": 1.5}, r"action_tokens=1\.5, but str or int"),
        ({"action_tokens": True}, "action_tokens=True"),
        ({"run": True}, "run=True, but int or NoneType"),
        ({"state": [0]}, r"state=\[0\]"),
        ({"blocks": {}}, "blocks={}"),
        ({"final_norm": None}, "needs blocks= and final_norm="),
        ({"owner": None}, "owner=None, but str"),
    ],
)
def test_a_foreign_row(change, message):
    with pytest.raises(AdapterFormatError, match=message):
        saved(row={**row_to_json(ROW), **change}).arguments()


def test_a_row_of_a_wrong_kind_or_without_a_name():
    with pytest.raises(AdapterFormatError, match=r"row=\[\], but dict or NoneType"):
        saved(row=[])
    content = row_to_json(ROW)
    del content["name"]
    with pytest.raises(AdapterFormatError, match=r"row lacks \['name'\]"):
        saved(row=content).arguments()
