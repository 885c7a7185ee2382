"""A list of blocks has a name that can be saved and found again; blocks= keeps what the row says of the rest."""

from __future__ import annotations

import pytest
import torch
from helpers.toys import Block, BypassPolicy, DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import LaraArgumentError, PolicySpec, TapNotFound, attach_lara, policies
from lara_adapter.attach import locate
from lara_adapter.blocks import block_paths, blocks_name, same_blocks
from lara_adapter.inspection import describe_policy
from lara_adapter.tap import resolve_tap

GENERIC = policies.GENERIC


class DictPolicy(DitPolicy):
    """Its blocks are the values of a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.held = nn.ModuleDict({name: block for name, block in zip("vwxyz", self.transformer_blocks)})
        del self._modules["transformer_blocks"]

    @property
    def transformer_blocks(self):
        return list(self.held.values())


class NumberedPolicy(DitPolicy):
    """Its blocks are attributes of a part, registered in another order than they run."""

    def __init__(self, numbers=(8, 9, 10, 11, 12)):
        super().__init__()
        blocks = dict(zip(numbers, self._modules.pop("transformer_blocks")))
        self.numbers, self.net = numbers, nn.Module()
        for number in sorted(numbers, key=str):
            self.net.add_module(f"block{number}", blocks[number])

    @property
    def transformer_blocks(self):
        return [getattr(self.net, f"block{number}") for number in self.numbers]


class PartsPolicy(DitPolicy):
    """Its blocks are in several places."""

    def __init__(self):
        super().__init__()
        first, *middle, last = self._modules.pop("transformer_blocks")
        self.first, self.middle, self.last = first, nn.ModuleList(middle), last

    @property
    def transformer_blocks(self):
        return [self.first, *self.middle, self.last]


SHAPES = [
    (DitPolicy, "transformer_blocks", "transformer_blocks.2"),
    (DictPolicy, "held", "held.x"),
    (NumberedPolicy, "net.block*", "net.block10"),
    (PartsPolicy, "first,middle,last", "middle.1"),
]


@pytest.mark.parametrize(("host", "name", "tap"), SHAPES)
def test_blocks_by_name_and_as_modules(host, name, tap):
    policy = host()
    modules = list(policy.transformer_blocks)
    for given in (name, f" {name.replace(',', ' , ')} ", modules, tuple(modules), nn.ModuleList(modules),
                  nn.ModuleDict({str(i): m for i, m in enumerate(modules)})):  # fmt: skip
        found = resolve_tap(policy, -3, given, GENERIC)
        again = resolve_tap(policy, -3, found.blocks, GENERIC)
        assert (found.path, found.depth, found.layer, found.width) == (tap, 5, 3, 16)
        assert again == found
        assert [policy.get_submodule(path) for path in block_paths(policy, found.blocks)] == modules
    if "," not in name:
        assert blocks_name(policy, modules) == name


def test_modules_in_a_container_of_the_policy_have_its_path():
    policy = DictPolicy()
    assert blocks_name(policy, policy.held) == blocks_name(policy, list(policy.held.values())) == "held"
    policy = DitPolicy()
    part = policy.transformer_blocks[1:4]
    assert blocks_name(policy, part) == "transformer_blocks.1,transformer_blocks.2,transformer_blocks.3"
    assert resolve_tap(policy, -1, part, GENERIC).path == "transformer_blocks.3"


@pytest.mark.parametrize(("host", "name", "tap"), SHAPES[:3])
def test_every_shape_attaches_by_structure_checks_and_is_described(host, name, tap):
    policy = host().train()
    report = describe_policy(policy)
    assert (report.blocks, report.tap, report.depth, report.trainable_blocks_below) == (name, tap, 5, 3)
    lara = attach_lara(policy, OwnLam())
    assert (lara.config.blocks, lara.config.tap) == (name, tap)
    policy(make_batch())["loss"].backward()
    checked = lara.check(make_batch())
    assert (checked.blocks_below, checked.blocks_reached, checked.blocks_above_reached) == (3, 3, 0)


def test_a_star_may_stand_inside_a_path():
    policy = nn.Module()
    policy.layers = nn.ModuleList()
    for _ in range(3):
        policy.layers.append(nn.ModuleDict({"norm": nn.LayerNorm(16), "inner": Block()}))
    assert block_paths(policy, "layers.*.inner") == ("layers.0.inner", "layers.1.inner", "layers.2.inner")
    assert block_paths(policy, "layers.0.inner,layers.2.inner") == ("layers.0.inner", "layers.2.inner")


def test_a_part_compiled_after_attaching_keeps_its_numbered_blocks():
    policy = NumberedPolicy()
    policy.net = torch.compile(policy.net, backend="eager")
    assert block_paths(policy, "net.block*")[0] == "net.block8"
    assert policy.get_submodule("net.block8") is policy.transformer_blocks[0]


def test_weight_tied_depth_has_a_path_per_place():
    policy = DitPolicy().train()
    policy.transformer_blocks = nn.ModuleList([policy.transformer_blocks[0]] * 6)
    assert block_paths(policy, "transformer_blocks") == tuple(f"transformer_blocks.{i}" for i in range(6))
    assert blocks_name(policy, [policy.transformer_blocks[0]] * 6) == "transformer_blocks"
    report = describe_policy(policy)
    assert (report.depth, report.blocks_below, report.trainable_blocks_below) == (6, 4, 4)
    lara = attach_lara(policy, OwnLam())
    assert (lara.config.depth, lara.config.layer, lara.config.tap) == (6, 4, "transformer_blocks.3")
    checked = lara.check(make_batch())  # the blocks above share the weights below the tap: that is not a leak
    assert (checked.blocks_below, checked.blocks_reached, checked.blocks_above_reached) == (4, 4, 0)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("net.block", "net has no 'block'; it has .*'block8'"),
        (
            "net.stage*",
            r"'net\.stage\*', but net has 0 children of that name .*two or more are expected; it has .*block8",
        ),
        ("*.block*", "2 times"),
        ("net.block8,,net.block9", "an empty path between its commas"),
        ("net.block8,net.block99", "net has no 'block99'"),
        ("net.block*.inner", r"net\.block8 has no 'inner'"),
        ("net", r"is a Module, but a ModuleList of blocks is expected; inside it: \['net\.block\*'"),
        ([], "empty list"),
        (nn.ModuleList(), "empty ModuleList"),
        ([Block(), Block()], "holds a Block that is not part of the policy"),
    ],
)
def test_wrong_blocks(blocks, message):
    policy = NumberedPolicy()
    with pytest.raises(TapNotFound, match=message):
        attach_lara(policy, OwnLam(), blocks=blocks)
    assert not hasattr(policy, "lara")


@pytest.mark.parametrize("blocks", [3, ["net.block8", "net.block9"], {"a": Block()}, torch.zeros(2)], ids=str)
def test_blocks_of_a_wrong_kind(blocks):
    with pytest.raises(LaraArgumentError, match=r"a dotted path .*a ModuleList or a list of modules"):
        attach_lara(NumberedPolicy(), OwnLam(), blocks=blocks)


# ---------------------------------------------------------------------- the row


@pytest.fixture
def row(monkeypatch):
    row = PolicySpec(
        "walked", ("helpers:BypassPolicy",), "layers", tap="norm", norm="input_layernorm", final_norm="norm",
        action_tokens="first", frames="my.frames", owner="norm", draws="tile", entry="compute_loss", action="a",
        mask="m", padding="p", loss="l", state=1, run=-1, layout="sequence",
    )  # fmt: skip
    monkeypatch.setattr(policies, "_TABLE", [row, *policies._TABLE])
    return row


@pytest.mark.parametrize("own", ["path", "module", "list", "comma"])
def test_the_rows_own_blocks_keep_the_row(row, own):
    policy = BypassPolicy()
    given = {
        "path": "layers", "module": policy.layers, "list": list(policy.layers),
        "comma": ",".join(f"layers.{i}" for i in range(4)),
    }[own]  # fmt: skip
    _, spec, tap = locate(policy, 2, given)
    assert spec is row
    assert (tap.blocks, tap.path, tap.kind) == ("layers", "layers.2.input_layernorm", "input")


def test_other_blocks_keep_what_the_row_says_of_the_batch(row):
    policy = BypassPolicy()
    policy.other = nn.ModuleList(Block() for _ in range(3))
    _, spec, tap = locate(policy, -1, "other")
    assert (tap.path, tap.kind) == ("other.2", "output")
    changed = {"blocks": None, "tap": "output", "norm": "input_layernorm", "final_norm": None}
    for name in PolicySpec.__dataclass_fields__:
        assert getattr(spec, name) == changed.get(name, getattr(row, name)), name


def test_a_row_without_blocks_keeps_the_rest_for_named_ones():
    spec = PolicySpec("tiled", draws="tile", action_tokens="first")
    _, kept, tap = locate(DitPolicy(), -3, "transformer_blocks", spec)
    assert (kept, tap.blocks) == (spec, "transformer_blocks")


def test_a_row_whose_blocks_this_policy_lacks_gives_way_to_named_ones(row):
    class Changed(BypassPolicy):
        def __init__(self):
            super().__init__()
            self.renamed = self._modules.pop("layers")

    _, spec, tap = locate(Changed(), -1, "renamed")
    assert (spec.tap, spec.draws, tap.path) == ("output", "tile", "renamed.3")
    assert not same_blocks(Changed(), "renamed", "layers")
