"""DeepSpeed ZeRO-2/3, as far as it can be checked without a GPU: who reads parameters, and from where sizes come.

ZeRO-3 gathers a parameter only within the forward of the module that owns it, and before that its shape reads 0.
What needs GPUs is in benchmarks/setups/gpu.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.models import TINY
from helpers.toys import DitPolicy, OwnLam, make_batch
from torch import nn

from lara_adapter import LatentActionConfig, LatentActionModel, attach_lara

PACKAGE = Path(__file__).parents[2] / "lara_adapter"


class Gathered(torch.Tensor):
    """A parameter that refuses to be computed with unless its owner's forward is running."""

    owners: dict = {}  # noqa: RUF012
    open_modules: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        harmless = {"__get__", "__set__", "requires_grad_", "detach", "size", "dim", "__repr__", "numel", "backward"}
        if name not in harmless:
            for argument in _tensors((args, kwargs or {})):
                owner = cls.owners.get(id(argument))
                if owner is not None and owner not in cls.open_modules:
                    raise AssertionError(f"{owner} read from outside its forward by {name}")
        return super().__torch_function__(function, types, args, kwargs or {})


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
def test_no_parameter_of_ours_is_read_outside_its_owners_forward(alignment, monkeypatch):
    policy = DitPolicy().train()
    lara = attach_lara(policy, LatentActionModel(LatentActionConfig.tiny(**TINY)), alignment=alignment)
    monkeypatch.setattr(Gathered, "owners", {})
    monkeypatch.setattr(Gathered, "open_modules", [])
    for path, module in lara.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            watched = parameter.detach().as_subclass(Gathered).requires_grad_()
            watched.__class__ = Gathered
            module._parameters[name] = watched
            Gathered.owners[id(watched)] = path
        module.register_forward_pre_hook(lambda m, a, path=path: Gathered.open_modules.append(path))
        module.register_forward_hook(lambda m, a, o, path=path: Gathered.open_modules.remove(path))
        # the attention of torch reads its out_proj itself; ZeRO-3 knows that module
        if isinstance(module, nn.MultiheadAttention):
            for name, _ in module.named_modules():
                Gathered.owners = {k: v for k, v in Gathered.owners.items() if v != f"{path}.{name}".rstrip(".")}
    assert len(Gathered.owners) > 20
    for step in range(4):  # warm-up, initialisation from data, quantised
        policy(make_batch(seed=step))["loss"].backward()
    assert lara.losses.total > 0


def test_the_watch_does_notice():
    """A LAM that reads a child's weight itself is caught: the test above can fail."""

    class Peeking(OwnLam):
        def encode(self, frame_t, frame_future):
            latent = super().encode(frame_t, frame_future)
            return latent._replace(continuous=latent.continuous + self.future.weight.sum() * 0)

    policy = DitPolicy().train()
    lara = attach_lara(policy, Peeking())
    watched = lara.lam.future.weight.detach().as_subclass(Gathered).requires_grad_()
    lara.lam.future._parameters["weight"] = watched
    Gathered.owners = {id(watched): "lam.future"}
    try:
        with pytest.raises(AssertionError, match=r"lam\.future read from outside its forward"):
            policy(make_batch())
    finally:
        Gathered.owners = {}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes_come_from_configurations_and_never_from_weights(path):
    """Under zero.Init a weight's shape reads 0."""
    for node in ast.walk(ast.parse(path.read_text())):
        shape = isinstance(node, ast.Attribute) and node.attr == "shape"
        if shape and isinstance(node.value, ast.Attribute) and node.value.attr in ("weight", "bias"):
            raise AssertionError(f"{path.name}:{node.lineno} reads the shape of a weight")


def test_attaching_needs_no_weight_shapes():
    """All of the policy's weights empty, as zero.Init leaves them: the width is still found."""
    policy = DitPolicy()
    for module in policy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(0))
    lara = attach_lara(policy, OwnLam())
    assert lara.config.hidden_width == 16
