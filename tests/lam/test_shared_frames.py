"""A frame of several pairs goes through the frozen encoder once, and nothing else changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lara_adapter import LatentActionConfig, LatentActionModel
from lara_adapter.data import PairBatch
from lara_adapter.lam.pretrain.shared_frames import share_frames


class Backbone(nn.Module):
    """Patches of 8 pixels to tokens of width 16; counts what it sees."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(patch_size=8)
        self.patches, self.seen = nn.Conv2d(3, 16, 8, 8), 0

    def forward(self, pixel_values):
        self.seen += len(pixel_values)
        return SimpleNamespace(last_hidden_state=self.patches(pixel_values).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("difference", "still"), [(False, False), (True, False), (True, True)])
def test_the_loss_and_every_gradient_are_the_same(difference, still):
    backbone = Backbone()
    config = LatentActionConfig.tiny(
        image_size=16, image_encoder="toy", encoder_width=16, difference_input=difference, vq_warmup_steps=0,
        subtract_still=still,
    )  # fmt: skip
    model = LatentActionModel(config, backbone=backbone).train()
    frames = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    present, future = torch.tensor([0, 1, 2, 4, 1]), torch.tensor([1, 2, 3, 5, 3])
    batch = PairBatch(frames, present, future, torch.zeros(5, 2), 0)

    def step():
        model.zero_grad()
        backbone.seen = 0
        loss = model(*batch.pair()).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], backbone.seen

    model.quantizer.eval()  # or the codes' usage would move between the two
    alone = step()
    with share_frames(model, batch):
        shared = step()
    assert model.image_encoder.cache is None
    rest = (5 if difference else 0) + still  # and the difference image of two equal frames
    assert (alone[2], shared[2]) == (10 + rest, 6 + rest)
    torch.testing.assert_close(shared[0], alone[0])
    assert len(shared[1]) == len(alone[1]) > 10
    for one, other in zip(shared[1], alone[1]):
        torch.testing.assert_close(one, other)


def test_an_encoder_that_trains_is_left_alone():
    model = LatentActionModel(LatentActionConfig.tiny(image_size=16))
    batch = PairBatch(
        torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0]), torch.tensor([1]), torch.zeros(1, 2), 0
    )
    with share_frames(model, batch):
        assert model(*batch.pair()).loss.requires_grad
