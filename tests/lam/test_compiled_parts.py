"""Where the host compiles no more than its own parts, the LAM's can be compiled each on its own."""

from __future__ import annotations

import copy

import torch
from test_model import frames, small


def test_the_same_loss_gradients_and_names():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = small().train()
    compiled = copy.deepcopy(plain)
    for part in (compiled.inverse_dynamics, compiled.forward_dynamics):
        part.compile(backend="aot_eager", fullgraph=True)
    for number in range(2):
        for lam in (plain, compiled):
            lam.zero_grad()
            lam(*frames(seed=number), reconstruct=0.5, draw=number).loss.backward()
        for (name, expected), (other, found) in zip(plain.named_parameters(), compiled.named_parameters()):
            assert name == other
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert copy.deepcopy(compiled)(*frames()).loss.isfinite()
    torch._dynamo.reset()
