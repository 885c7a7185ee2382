"""Export: refused while attached, identical to a never-attached policy after detach."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.models import FixedDit
from helpers.toys import OwnLam, make_batch

from lara_adapter import AttachOrderError, attach_lara


class Exportable(FixedDit):
    """Tensors in, tensor out: what deployment exports. Keeps no record: torch 2.7's strict export refuses that."""

    def denoise(self, state, noisy, time):
        x = torch.cat([self.state_in(state)[:, None], self.action_in(F.pad(noisy, (0, 1)))], 1) + self.position
        for block in self.transformer_blocks:
            x = block(x)
        return self.action_out(x[:, 1:])

    def forward(self, state, action):
        return super().forward({"state": state, "action": action})["loss"]


def inputs():
    batch = make_batch()
    return batch["state"], batch["action"]


@pytest.fixture
def pair():
    """A policy that was attached, trained and detached, and one that never was."""
    torch.manual_seed(0)
    never = Exportable().eval()
    policy = copy.deepcopy(never)
    lara = attach_lara(policy, OwnLam(), frames=lambda first: make_batch()["lara_frames"])
    policy.train()
    policy(*inputs()).backward()
    policy.zero_grad(set_to_none=True)
    policy.eval()
    return never, policy, lara


def operations(program):
    return [(node.op, str(node.target)) for node in program.graph.nodes]


@pytest.mark.parametrize("strict", [False, True])
def test_export_after_detach_equals_that_of_a_policy_never_attached(pair, strict):
    never, policy, lara = pair
    lara.detach()
    expected = torch.export.export(never, inputs(), strict=strict)
    found = torch.export.export(policy, inputs(), strict=strict)
    assert operations(found) == operations(expected)
    assert found.state_dict.keys() == expected.state_dict.keys()
    assert torch.equal(found.module()(*inputs()), expected.module()(*inputs()))


def test_a_detached_copy_exports_while_the_policy_stays_attached(pair):
    never, _, lara = pair
    found = torch.export.export(lara.detached_copy(), inputs(), strict=False)
    assert operations(found) == operations(torch.export.export(never, inputs(), strict=False))


def test_export_while_attached_is_refused(pair):
    _, policy, _ = pair
    with pytest.raises(AttachOrderError, match=r"being exported with LARA attached; lara\.detach\(\) first"):
        torch.export.export(policy, inputs(), strict=False)
    with pytest.raises(AttachOrderError, match="being exported"):
        torch.jit.trace(policy, inputs())


def test_export_of_a_part_leaves_nothing_in_the_tap(pair):
    """Exporters take the head alone; its hook runs, unarmed."""
    _, policy, lara = pair
    torch.export.export(policy.transformer_blocks[2], (torch.zeros(2, 7, 16),), strict=False)
    assert lara.binding._captured == ()
    policy.train()
    policy(*inputs()).backward()


@pytest.mark.long
def test_onnx_after_detach_equals_that_of_a_policy_never_attached(pair, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    never, policy, lara = pair
    lara.detach()
    models = []
    for name, module in (("never", never), ("detached", policy)):
        torch.onnx.export(module, inputs(), tmp_path / f"{name}.onnx", dynamo=True, verbose=False)
        models.append(onnx.load(tmp_path / f"{name}.onnx"))
    nodes = [[(node.op_type, list(node.input), list(node.output)) for node in model.graph.node] for model in models]
    assert nodes[0] == nodes[1]
    weights = [{w.name: w.raw_data for w in model.graph.initializer} for model in models]
    assert weights[0] == weights[1]


def test_onnx_while_attached_is_refused(pair, tmp_path):
    pytest.importorskip("onnxscript")
    _, policy, _ = pair
    with pytest.raises(Exception, match="being exported with LARA attached"):
        torch.onnx.export(policy, inputs(), tmp_path / "m.onnx", dynamo=True, verbose=False)
