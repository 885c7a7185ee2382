import pytest
import torch
from helpers.toys import Block, BypassPolicy, DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import LaraArgumentError, PolicySpec, TapNeverFired, TapNotFound, attach_lara, register_policy
from lara_adapter import adapter as adapter_module
from lara_adapter import policies as policies_module
from lara_adapter.heads import find_blocks
from lara_adapter.tap import absolute_layer, resolve_tap


@pytest.fixture
def bypass_spec(monkeypatch):
    """A row for the toy host that never calls its layers, as a third party would register it."""
    monkeypatch.setattr(policies_module, "_TABLE", list(policies_module._TABLE))
    spec = PolicySpec("bypass", ("helpers:BypassPolicy",), "layers", tap="norm", final_norm="norm")
    register_policy(spec)
    return spec


@pytest.mark.parametrize("depth", range(4, 17))
def test_layer_minus_three_is_all_hidden_states_minus_three(depth, monkeypatch):
    """The official release's all_hidden_states[-3], the list starting with the embeddings, bit for bit."""
    policy = DitPolicy(depth=depth).train()
    lara = attach_lara(policy, OwnLam(), layer=-3)
    seen = spy_on_the_tap(monkeypatch)
    policy(make_batch())
    assert lara.config.layer == depth - 2
    assert seen[0] is policy.hidden_states[-3]


def spy_on_the_tap(monkeypatch):
    seen, original = [], adapter_module.select_rows
    monkeypatch.setattr(adapter_module, "select_rows", lambda h, *a, **k: (seen.append(h), original(h, *a, **k))[1])
    return seen


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4, 5, -1, -2, -6, "L", "L-2", "L - 5"])
def test_every_layer_reads_its_state(layer, policy, lam, monkeypatch):
    lara = attach_lara(policy, lam, layer=layer)
    seen = spy_on_the_tap(monkeypatch)
    policy(make_batch())
    assert seen[0] is policy.hidden_states[lara.config.layer]


@pytest.mark.parametrize("layer", range(5))
def test_norm_tap_reads_the_residual_state_of_a_host_that_bypasses_its_layers(layer, bypass_spec, monkeypatch):
    policy = BypassPolicy(depth=4).train()
    lara = attach_lara(policy, OwnLam(), layer=layer, frames=lambda observation: observation["frames"])
    seen = spy_on_the_tap(monkeypatch)
    batch = make_batch()
    policy({"frames": batch["lara_frames"]}, batch["action"]).mean().backward()
    assert seen[0] is policy.hidden_states[layer]
    assert lara.config.tap == ("norm" if layer == 4 else f"layers.{layer}.input_layernorm")


def test_a_block_hook_on_a_host_that_bypasses_its_layers_is_an_error_and_not_a_silent_zero():
    policy = BypassPolicy().train()
    attach_lara(policy, OwnLam(), frames=lambda observation: observation["frames"])
    batch = make_batch()
    with pytest.raises(TapNeverFired, match=r"no tensor passed 'layers\.1'.*tap='norm'"):
        policy({"frames": batch["lara_frames"]}, batch["action"])


@pytest.mark.parametrize(
    ("layer", "index"), [(0, 0), (32, 32), (-1, 32), (-3, 30), (-33, 0), ("L", 32), ("L-2", 30), (" L - 32", 0)]
)
def test_absolute_layer(layer, index):
    assert absolute_layer(layer, 32, "blocks") == index


@pytest.mark.parametrize("layer", [33, 40, -34, "L-33"])
def test_layer_out_of_range_names_the_range(layer):
    wanted = rf"layer={layer}, but action_head.model.transformer_blocks has 32 blocks; use 0..32 or -33..-1"
    with pytest.raises(TapNotFound, match=wanted.replace(".", r"\.")):
        absolute_layer(layer, 32, "action_head.model.transformer_blocks")


@pytest.mark.parametrize("layer", ["last", "L+1", 1.5, None, True])
def test_layer_of_a_wrong_kind(layer):
    with pytest.raises(LaraArgumentError, match="an integer, 'L' or 'L-2' is expected"):
        absolute_layer(layer, 32, "blocks")


class Vlm(nn.Module):
    """A backbone with its own list of attention blocks beside the head."""

    def __init__(self, head: nn.Module, name: str) -> None:
        super().__init__()
        self.language_model = nn.ModuleList(Block() for _ in range(3))
        self.add_module(name, head)


def test_structure_prefers_the_action_head_over_a_vlm():
    assert find_blocks(Vlm(DitPolicy(), "action_head")) == "action_head.transformer_blocks"


def test_structure_does_not_guess_among_equals_and_lists_them():
    policy = nn.Module()
    policy.first = nn.ModuleList(Block() for _ in range(3))
    policy.second = nn.ModuleList(Block() for _ in range(4))
    with pytest.raises(TapNotFound, match=r"first \(3 x Block\); second \(4 x Block\)"):
        find_blocks(policy)


def test_structure_finds_nothing_without_attention():
    with pytest.raises(TapNotFound, match="pass blocks="):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_blocks_by_name_and_by_module(policy, lam):
    spec = PolicySpec("generic")
    by_name = resolve_tap(policy, -3, "transformer_blocks", spec)
    assert by_name == resolve_tap(policy, -3, policy.transformer_blocks, spec) == resolve_tap(policy, -3, None, spec)
    assert by_name.path == "transformer_blocks.2"
    assert by_name.width == 16


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("transformer_block", "has no 'transformer_block'; it has .*transformer_blocks"),
        ("transformer_blocks.0.nowhere", r"transformer_blocks\.0 has no 'nowhere'"),
        ("action_in", "is a Linear, but a ModuleList of blocks is expected"),
        ("", "is a DitPolicy, but a ModuleList of blocks is expected; inside it: .*transformer_blocks"),
        (nn.ModuleList([nn.Linear(1, 1)]), "not part of the policy"),
    ],
)
def test_wrong_blocks(policy, lam, blocks, message):
    with pytest.raises(TapNotFound, match=message):
        attach_lara(policy, lam, blocks=blocks)
    assert not hasattr(policy, "lara")


def test_width_is_told_by_structure_for_common_blocks():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, batch_first=True), 3, enable_nested_tensor=False)
    assert resolve_tap(layers, -1, "layers", PolicySpec("generic")).width == 24


def test_unknown_width_asks_for_a_projector(lam):
    class Opaque(nn.Module):
        def forward(self, x):
            return x

    policy = nn.Module()
    policy.attention_blocks = nn.ModuleList([Opaque(), Opaque()])
    policy.forward = lambda batch: batch
    with pytest.raises(LaraArgumentError, match=r"pass projector=nn\.Linear\(width, 8\)"):
        attach_lara(policy, lam, layer=-1, blocks="attention_blocks")


def test_first_tensor_of_what_blocks_return():
    from lara_adapter.capture import pick_state

    def first_tensor(value):
        return pick_state(value, None, "blocks.0")

    x = torch.zeros(1)
    assert first_tensor(x) is first_tensor((x, None)) is first_tensor({"a": None, "b": x}) is first_tensor([1, x]) is x
    assert first_tensor(None) is first_tensor((1, "a")) is None
