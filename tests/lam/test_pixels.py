"""The one resize: any leading dimensions, float or uint8, the same picture."""

from __future__ import annotations

import pytest
import torch

from lara_adapter.lam.pixels import resize


@pytest.mark.parametrize("size", [8, 40, (12, 20)])
def test_every_image_is_resized_by_itself_and_uint8_is_the_rounded_float(size):
    images = torch.randint(0, 256, (2, 3, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = resize(images, size)
    assert small.shape == (2, 3, 3, *(size if isinstance(size, tuple) else (size, size)))
    assert small.dtype == torch.uint8
    assert torch.equal(small[1, 2], resize(images[1, 2], size))
    exact = resize(images.float(), size)
    assert (small.float() - exact).abs().max() <= 1.5
    assert (small.float() - exact).abs().mean() < 0.5


def test_images_of_that_size_are_handed_on():
    images = torch.zeros(2, 3, 16, 24)
    assert resize(images, (16, 24)) is images
