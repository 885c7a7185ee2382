import pytest
from helpers.toys import BypassPolicy, DitPolicy

from lara_adapter import LaraArgumentError, PolicySpec, attach_lara, policies
from lara_adapter.policies import GENERIC, find_spec, register_policy


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    monkeypatch.setattr(policies, "_TABLE", list(policies._TABLE))


def _instance(module: str, name: str, base=DitPolicy):
    return type(name, (base,), {"__module__": module})()


@pytest.mark.parametrize(
    ("module", "name", "family"),
    [
        ("gr00t.model.gr00t_n1d6.gr00t_n1d6", "Gr00tN1d6", "gr00t-n1.6"),
        ("lerobot.policies.pi05.modeling_pi05", "PI05Policy", "lerobot-pi"),
        ("openpi.models_pytorch.pi0_pytorch", "PI0Pytorch", "openpi"),
        ("somewhere", "Gr00tN1d6", "generic"),
        ("toys", "DitPolicy", "generic"),
    ],
)
def test_rows_match_by_package_and_class(module, name, family):
    assert find_spec(_instance(module, name)).name == family


def test_subclasses_match_their_base():
    base = type(_instance("lerobot.policies.xvla", "XVLAPolicy"))
    assert find_spec(_instance("mine", "MyPolicy", base)).name == "lerobot-xvla"


def test_a_registered_row_wins():
    register_policy(PolicySpec("mine", ("helpers:DitPolicy",), "transformer_blocks"))
    assert find_spec(DitPolicy()).name == "mine"


def test_entry_points_and_a_broken_one(monkeypatch, caplog):
    class Entry:
        value = "plugin:SPEC"

        def __init__(self, result):
            self.result = result

        def load(self):
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

    entries = [
        Entry(PolicySpec("one", ("helpers:DitPolicy",))), Entry(ImportError("no such host")),
        Entry([PolicySpec("two", ("helpers:BypassPolicy",), "layers")]),
    ]  # fmt: skip
    monkeypatch.setattr(policies, "entry_points", lambda group: entries if group == "lara_adapter.policies" else [])
    policies._entry_point_rows.cache_clear()
    try:
        assert find_spec(DitPolicy()).name == "one"
        assert "plugin:SPEC could not be loaded: no such host" in caplog.text
    finally:
        policies._entry_point_rows.cache_clear()


def test_generic_row_is_the_default():
    assert find_spec(DitPolicy()) is GENERIC


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tap": "middle"}, "tap='middle'"),
        ({"draws": "random"}, "draws='random'"),
        ({"layout": "diagonal"}, "layout='diagonal'"),
        ({"action_tokens": None}, "action_tokens=None"),
        ({"run": "last"}, "run='last'"),
        ({"entry": ""}, "entry=''"),
        ({"tap": "norm"}, "needs blocks= and final_norm="),
        ({"classes": ("NoModule",)}, "'package:ClassName' is expected"),
    ],
)
def test_rows_are_checked(fields, message):
    with pytest.raises(LaraArgumentError, match=message):
        PolicySpec("x", **fields)
    with pytest.raises(LaraArgumentError, match="classes is empty"):
        register_policy(PolicySpec("x"))


def test_a_row_for_one_call_leaves_the_table_alone(lam, batch):
    rows = list(policies._TABLE)
    spec = PolicySpec("once", blocks="layers", tap="norm", final_norm="norm")
    for _ in range(2):
        policy = BypassPolicy().train()
        lara = attach_lara(policy, lam, -1, frames=lambda observation: observation["frames"], spec=spec)
        policy({"frames": batch["lara_frames"]}, batch["action"]).mean().backward()
        assert (lara.spec, lara.config.policy_family, lara.config.tap) == (spec, "once", "norm")
        lara.detach()
        assert rows == policies._TABLE
    assert find_spec(BypassPolicy()) is GENERIC
