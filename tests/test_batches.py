"""What a policy is given, in whatever form: looked up, and changed in a copy."""

import dataclasses
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from lara_adapter.batches import lookup, replaced, without
from lara_adapter.hostcall import fold_loss, host_loss

KEYS = ("action", "frames", "state")


@dataclasses.dataclass(frozen=True)
class Data:
    action: torch.Tensor
    frames: torch.Tensor | None = None
    name: str = "x"

    def __post_init__(self):
        assert self.action is not None


class Named(NamedTuple):
    action: torch.Tensor
    frames: torch.Tensor | None = None


class Kept(dict):
    """Stands for BatchFeature: a mapping of a type of its own."""


ACTION, FRAMES = torch.arange(12.0).view(4, 3), torch.ones(4, 2)
FORMS = {
    "dict": {"action": ACTION, "frames": FRAMES},
    "own type": Kept(action=ACTION, frames=FRAMES),
    "read-only": MappingProxyType({"action": ACTION, "frames": FRAMES}),
    "scopes": {
        "lang": {"action": ACTION[:3], "frames": FRAMES[:3]},
        "vis": {"action": ACTION[3:], "frames": FRAMES[3:]},
    },
    "samples": [{"action": ACTION[i], "frames": FRAMES[i], "lang": "x"} for i in range(4)],
    "tuple of samples": tuple({"action": ACTION[i], "frames": FRAMES[i]} for i in range(4)),
    "arrays": [{"action": ACTION[i].numpy(), "frames": FRAMES[i].numpy()} for i in range(4)],
    "frozen dataclass": Data(ACTION, FRAMES),
    "named tuple": Named(ACTION, FRAMES),
    "object": SimpleNamespace(action=ACTION, frames=FRAMES),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    batch = FORMS[form]
    assert torch.equal(lookup(batch, KEYS)["action"], ACTION)
    assert torch.equal(lookup(batch, KEYS)["frames"], FRAMES)
    assert "state" not in lookup(batch, KEYS)

    reduced = without(batch, ["frames"])
    kind = dict if form == "read-only" else type(batch)
    assert type(reduced) is kind
    assert lookup(reduced, KEYS).get("frames") is None
    assert torch.equal(lookup(reduced, KEYS)["action"], ACTION)
    assert without(reduced, ["frames"]) is reduced

    changed = replaced(batch, "action", ACTION + 1)
    assert type(changed) is kind
    assert torch.equal(lookup(changed, KEYS)["action"], ACTION + 1)
    assert torch.equal(lookup(changed, KEYS)["frames"], FRAMES)
    assert torch.equal(lookup(batch, KEYS)["action"], ACTION)  # the caller's is as it was
    assert torch.equal(lookup(batch, KEYS)["frames"], FRAMES)


def test_arrays_stay_arrays():
    assert isinstance(replaced(FORMS["arrays"], "action", ACTION)[0]["action"], np.ndarray)


def test_a_mapping_with_nested_mappings_and_tensors_is_one_batch():
    batch = {"observation": {"state": torch.zeros(4, 2)}, "action": ACTION}
    assert lookup(batch, KEYS) is batch
    assert without(batch, ["frames"]) is batch


def test_samples_that_do_not_fit_together_are_named():
    samples = [{"action": torch.zeros(3)}, {"action": torch.zeros(2)}]
    with pytest.raises(ValueError, match=r"samples of the batch have 'action' of different shapes: \[\[3\], \[2\]\]"):
        lookup(samples, KEYS)


@pytest.mark.parametrize("batch", [None, 3, "text", torch.zeros(3), [], (), [1, 2], {}])
def test_what_has_no_entries(batch):
    assert dict(lookup(batch, KEYS)) == {}
    assert without(batch, ["frames"]) is batch


@dataclasses.dataclass(frozen=True)
class Output:
    total: torch.Tensor


@pytest.mark.parametrize(
    ("output", "key"),
    [
        ([torch.ones(()), {"x": 1}], None), ((torch.ones(()), None, 3), None),
        ({"action_loss": torch.ones(())}, "action_loss"),
        (MappingProxyType({"loss": torch.ones(())}), None), (Output(torch.ones(())), "total"),
        (SimpleNamespace(loss={"loss": torch.ones(()), "llm": 2}), "loss.loss"),
        ({"losses": {"action": {"flow": torch.ones(())}}}, "losses.action.flow"), ({"a.b": torch.ones(())}, "a.b"),
    ],
)  # fmt: skip
def test_the_loss_is_found_and_folded_in_every_output(output, key):
    assert host_loss(output, key) == 1
    folded = fold_loss(output, torch.tensor(2.0), None, dict, key)
    assert host_loss(folded, key) == 3
    if not isinstance(output, MappingProxyType):
        assert type(folded) is type(output)
