import json

import pytest

from lara_adapter import AdapterFormatError, LaraConfig

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
